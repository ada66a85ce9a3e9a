"""Imports TensorRT-LLM, in the one version whose engines this backend builds and runs."""

from __future__ import annotations

import importlib

from nvlm_trt.backends.tensorrt_llm.contract import CONTAINER, VERSION, Bindings
from nvlm_trt.errors import EngineError


def installed_version() -> str:
    """Return the version of the installed TensorRT-LLM. Raises EngineError without it, for the empty package that
    public indexes have, and for another version than the pinned one."""
    remedy = (
        f"use the container {CONTAINER}, which has {VERSION} (a build elsewhere stops before with --checkpoint-only)"
    )
    try:
        package = importlib.import_module("tensorrt_llm")
    except ImportError as error:
        raise EngineError(f"TensorRT-LLM cannot be imported ({error}); {remedy}") from None
    version = getattr(package, "__version__", None)
    if version is None:
        raise EngineError(f"the installed package tensorrt_llm is a stub without code; {remedy}")
    if version != VERSION:
        raise EngineError(f"TensorRT-LLM {version} is installed, and engines are built and run by {VERSION}; {remedy}")
    return VERSION


def import_bindings() -> Bindings:
    """Import the executor's bindings. Raises what `installed_version` raises."""
    installed_version()
    try:
        return Bindings.of(importlib.import_module("tensorrt_llm.bindings.executor"))
    except (ImportError, AttributeError) as error:
        raise EngineError(
            f"TensorRT-LLM {VERSION} is installed without its executor ({error}); use the container {CONTAINER}"
        ) from None
