"""Lists the backends: each folder beside this file exports one `SPEC`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

from nvlm_trt.backends.spec import BackendSpec
from nvlm_trt.errors import EngineError

DEFAULT_BACKEND = "onnxruntime"

# name -> the module whose SPEC describes the backend; `find_backend` imports the module
_ROOMS = {
    "onnxruntime": "nvlm_trt.backends.onnxruntime",
    "tensorrt": "nvlm_trt.backends.tensorrt",
    "tensorrt-rtx": "nvlm_trt.backends.tensorrt_rtx",
    "tensorrt-llm": "nvlm_trt.backends.tensorrt_llm",
}
_added: dict[str, BackendSpec] = {}


def backend_names() -> tuple[str, ...]:
    return (*_ROOMS, *_added)


def find_backend(name: str) -> BackendSpec:
    """Return the backend of this name. Raises EngineError for an unknown name."""
    if name in _added:
        return _added[name]
    if name not in _ROOMS:
        raise EngineError(f"backend {name!r} is not one of: {', '.join(backend_names())}; choose with --backend")
    spec: BackendSpec = importlib.import_module(_ROOMS[name]).SPEC
    return spec


def backend_summaries() -> str:
    """Write the backends for --help."""
    return " or ".join(find_backend(name).summary for name in _ROOMS)


def precision_summaries() -> str:
    """Write the precisions of each backend, and its default, for --help."""
    tables = [find_backend(name).precisions for name in _ROOMS]
    return " ".join(f"{table.backend}: {', '.join(table.names)} [{table.default}]." for table in tables)


def default_precisions() -> str:
    """Write the default precision of each backend for --help."""
    return ", ".join(f"{find_backend(name).precisions.default} for {name}" for name in _ROOMS)


@contextmanager
def added_backend(spec: BackendSpec) -> Iterator[BackendSpec]:
    """Add a backend from outside this package to the table while the context lasts."""
    assert spec.name not in backend_names(), f"there is a backend {spec.name} already"
    _added[spec.name] = spec
    try:
        yield spec
    finally:
        del _added[spec.name]
