"""Imports the Python front end of TensorRT-LLM from a source tree or an install, without CUDA and its compiled parts.

Call `import_tensorrt_llm` in a process of its own: `tensorrt` becomes TensorRT-RTX's bindings, which build the same
networks, and packages that have no part in building a network become stubs.
"""

from __future__ import annotations

import enum
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VARIABLE = "NVLM_TRT_TENSORRT_LLM"
MODEL_CLASS = Path(__file__).parents[3] / "nvlm_trt" / "backends" / "tensorrt_llm" / "model_class.py"
# Packages whose own modules are imported, and whose __init__ is not: it imports what serves, not what builds.
_NAMESPACES = ("tensorrt_llm", "tensorrt_llm.llmapi")
_STUBS = {
    *("accelerate", "aenum", "click", "cuda", "datasets", "diffusers", "evaluate", "fastapi", "h5py"),
    *("huggingface_hub", "modelopt", "mpi4py", "nvtx", "onnx_graphsurgeon", "pandas", "PIL", "polygraphy", "pulp"),
    *("pynvml", "ray", "requests", "sentencepiece", "tokenizers", "transformers", "yaml", "zmq"),
    *("tensorrt_llm._torch", "tensorrt_llm.auto_parallel", "tensorrt_llm.bindings", "tensorrt_llm.libs"),
    *("tensorrt_llm.executor", "tensorrt_llm.profiler"),
}


class _StubType(type):
    """Makes classes that take any arguments. Attributes of these, and of their instances, are such classes again."""

    def __getattr__(cls, name: str) -> Any:
        return _stub(name)

    def __call__(cls, *arguments: Any, **keywords: Any) -> Any:
        return type.__call__(cls)

    def __int__(cls) -> int:
        return 0  # a member of an enum


def _stub(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    # called with a function, an instance is a decorator
    members = {"__getattr__": lambda self, name: _stub(name), "__call__": lambda self, decorated: decorated}
    return _StubType(name, (), members)


class _KVCacheType(enum.Enum):
    """Stands for the enum of the compiled bindings, which versions before 1.3 use for three constants."""

    CONTINUOUS = 0
    PAGED = 1
    DISABLED = 2


class _StubModule(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012 (what the import system reads)

    def __getattr__(self, name: str) -> Any:
        known: dict[str, Any] = {"KVCacheType": _KVCacheType, "ENABLE_MULTI_DEVICE": False}
        value = known[name] if name in known else _stub(name)
        setattr(self, name, value)
        return value


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if any(name == stub or name.startswith(f"{stub}.") for stub in _STUBS):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def version(directory: Path) -> str:
    """Read the version of a source tree or of an install."""
    text = (directory / "tensorrt_llm" / "version.py").read_text(encoding="utf-8")
    (found,) = re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    return str(found)


def import_tensorrt_llm(directory: Path) -> None:
    """Make `import tensorrt_llm` work in this process, from `directory`/tensorrt_llm, and register our model class."""
    assert "tensorrt" not in sys.modules, "this process has imported TensorRT"
    import tensorrt_rtx_bindings as trt

    sys.modules["tensorrt"] = trt
    for name in _NAMESPACES:
        package = types.ModuleType(name)
        package.__path__ = [str(directory / Path(*name.split(".")))]
        sys.modules[name] = package
    sys.meta_path.insert(0, _StubFinder())
    real_version = importlib.metadata.version
    importlib.metadata.version = lambda name: "12.0.0" if name == "pynvml" else real_version(name)
    os.environ.setdefault("TLLM_LOG_LEVEL", "ERROR")

    from tensorrt_llm import functional

    # A network of TensorRT-RTX is strongly typed: the types of inputs are given when they are added, and no tensor has
    # a place of its own.
    functional.Tensor.dtype = property(functional.Tensor.dtype.fget, lambda self, value: None)
    functional.Tensor.location = property(lambda self: None, lambda self, value: None)
    load_model_class()


def load_model_class() -> Any:
    """Import our model class as `trtllm-build --model_cls_file` does, by its path and under the name `models`."""
    return importlib.machinery.SourceFileLoader("models", str(MODEL_CLASS)).load_module()
