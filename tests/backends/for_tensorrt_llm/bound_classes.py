"""Makes a stand-in for `tensorrt_llm.bindings.executor` of the contract's table: every call that the product makes is
bound to the table's parameters, and every value must have a type that the bindings convert."""

from __future__ import annotations

import enum
import inspect
import types
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from nvlm_trt.backends.tensorrt_llm import contract

TENSOR_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
_PARAMETERS = ("SamplingConfig", "OutputConfig", "PromptTuningConfig", "Request", "KvCacheConfig", "ParallelConfig",
               "ExecutorConfig")  # fmt: skip


def bind(function: Any, *arguments: Any, **keywords: Any) -> dict[str, Any]:
    """Returns the arguments of a call by name, defaults included. Raises TypeError as the bindings do."""
    bound = inspect.signature(function).bind(*arguments, **keywords)
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        if name != "self":
            check_type(function, name, value)
    return dict(bound.arguments)


def check_type(function: Any, name: str, value: Any) -> None:
    """Accepts what nanobind's casters accept: no NumPy number is an int to them, and tensors are torch's."""
    annotation = str(inspect.signature(function).parameters[name].annotation)
    if value is None:
        assert "None" in annotation, f"{function.__qualname__}: {name} may not be None"
        return
    wanted = annotation.removesuffix(" | None")
    if wanted in ("int", "float", "bool", "str"):
        kinds = {"int": (int,), "float": (float, int), "bool": (bool,), "str": (str,)}[wanted]
        fits = type(value) in kinds
    elif wanted in ("list[int]", "list[list[int]]"):
        rows = value if wanted == "list[list[int]]" else [value]
        fits = type(value) is list and all(type(row) is list and all(type(i) is int for i in row) for row in rows)
    elif wanted == "Tensor":
        fits = isinstance(value, torch.Tensor) and value.dtype in TENSOR_TYPES and value.is_contiguous()
    elif wanted == "timedelta":
        fits = isinstance(value, timedelta)
    elif wanted == "Path":
        fits = isinstance(value, Path)
    elif wanted == "Any":
        fits = isinstance(value, enum.Enum)
    else:
        fits = type(value).__name__ == wanted
    if not fits:
        raise TypeError(f"{function.__qualname__}: {name} is a {type(value).__name__}, not a {annotation}")


def parameter_class(name: str) -> type:
    """Makes a class that keeps the arguments of its constructor, as attributes."""
    declared = getattr(contract, name).__init__

    def keep(self: Any, *arguments: Any, **keywords: Any) -> None:
        values = bind(declared, self, *arguments, **keywords)
        vars(self).update({key: value for key, value in values.items() if key != "self"})

    return type(name, (), {"__init__": keep})


class FinishReason(enum.Enum):
    NOT_FINISHED = enum.auto()
    END_ID = enum.auto()
    STOP_WORDS = enum.auto()
    LENGTH = enum.auto()
    TIMED_OUT = enum.auto()
    CANCELLED = enum.auto()


class CommunicationType(enum.Enum):
    MPI = enum.auto()


class CommunicationMode(enum.Enum):
    LEADER = enum.auto()
    ORCHESTRATOR = enum.auto()


class ModelType(enum.Enum):
    DECODER_ONLY = enum.auto()
    ENCODER_ONLY = enum.auto()
    ENCODER_DECODER = enum.auto()


def executor_module(executor: type) -> types.ModuleType:
    """Makes the module. `executor` is the class Executor."""
    module: Any = types.ModuleType("tensorrt_llm.bindings.executor")
    for name in _PARAMETERS:
        setattr(module, name, parameter_class(name))
    for kind in (FinishReason, CommunicationType, CommunicationMode, ModelType):
        setattr(module, kind.__name__, kind)
    module.Executor = executor
    return module
