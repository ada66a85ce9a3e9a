"""Inspects the layers of a built TensorRT engine (a plan), and times the engine on the GPU."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab.gpu_check.record import NotAvailableError, Value

_WARM_UP = 10
_RUNS = 100
_REPEATED = tuple(f".{layer}" for layer in range(1, 200))  # past_key.1, ...: only the first layer's shape is shown


def component_plans(directory: Path) -> dict[str, Path]:
    """Returns component -> its file."""
    return {path.stem: path for path in sorted(directory.glob("*.plan"))}


def open_plan(path: Path) -> Any:
    """Returns a tensorrt.ICudaEngine."""
    import tensorrt as trt

    engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise ValueError(f"TensorRT cannot deserialise {path.name}; see its messages")
    return engine


class Layers:
    """The layers of a network by the inspector's JSON. Needs an engine built with DETAILED profiling verbosity."""

    def __init__(self, layers: Sequence[Any]) -> None:
        if not all(isinstance(layer, dict) for layer in layers):
            raise ValueError("the engine has only its layers' names; build it with DETAILED profiling verbosity")
        self._layers: Sequence[dict[str, Any]] = layers

    @classmethod
    def of(cls, engine: Any) -> Layers:
        import tensorrt as trt

        information = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        return cls(json.loads(information)["Layers"])

    @property
    def count(self) -> int:
        return len(self._layers)

    def named(self, *texts: str) -> int:
        """Counts layers with one of `texts` in their kind. Ignores names and metadata: those of a fused layer list all
        its sources."""
        return sum(any(text.lower() in _kind(layer) for text in texts) for layer in self._layers)

    def kinds(self) -> str:
        """Counts the layers by type, for the reader of a report in which an expected layer was not found."""
        counts = Counter(str(layer.get("LayerType")) for layer in self._layers)
        return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())

    def reading(self, kind: str) -> int:
        """Counts the layers that take an input of this type, except those that only reorder."""
        return sum(
            any(kind in str(tensor.get("Format/Datatype", "")) for tensor in layer.get("Inputs", ()))
            and "reformat" not in _kind(layer)
            for layer in self._layers
        )


def _kind(layer: dict[str, Any]) -> str:
    keys = ["LayerType", "ParameterType", "Operation", "PluginType", "TacticName"]
    if "plugin" in str(layer.get("LayerType", "")).lower():
        keys.append("Name")  # a plugin has its own: nothing is fused into it
    return " ".join(str(layer.get(key, "")) for key in keys).lower()


def latency(engine: Any, profile: int) -> tuple[dict[str, Value], str]:
    """Measures median and 99th percentile of the GPU's time at the profile's optimal shapes, as trtexec does: one
    enqueue after the other, between two events. Returns them and the shapes of the inputs."""
    if profile >= engine.num_optimization_profiles:
        raise NotAvailableError(f"the engine has {engine.num_optimization_profiles} optimisation profile(s)")
    stream = torch.cuda.Stream()
    context = engine.create_execution_context()
    if not context.set_optimization_profile_async(profile, stream.cuda_stream):
        raise ValueError(f"TensorRT refuses optimisation profile {profile}")
    inputs, outputs = _bind(engine, context, profile)
    stream.wait_stream(torch.cuda.current_stream())
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(_RUNS)]
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            _enqueue(context, stream)
        for begin, end in events:
            begin.record()
            _enqueue(context, stream)
            end.record()
    stream.synchronize()
    times = sorted(begin.elapsed_time(end) for begin, end in events)
    shown = {name: list(tensor.shape) for name, tensor in inputs.items() if not name.endswith(_REPEATED)}
    shapes = ", ".join(f"{name} {shape}" for name, shape in shown.items())
    del outputs  # kept until here: TensorRT wrote to their memory
    return {"median ms": statistics.median(times), "p99 ms": times[int(0.99 * len(times))]}, shapes


def _enqueue(context: Any, stream: torch.cuda.Stream) -> None:
    if not context.execute_async_v3(stream.cuda_stream):
        raise ValueError("TensorRT could not enqueue; see its messages")


def _bind(engine: Any, context: Any, profile: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Allocates every input and output; an output that shares an input's memory (the KV cache) gets that input."""
    import tensorrt as trt

    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = {}
    for name in names:
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            shape = tuple(engine.get_tensor_profile_shape(name, profile)[1])  # (least, optimal, most)
            context.set_input_shape(name, shape)
            inputs[name] = _filled(shape, _torch_type(engine.get_tensor_dtype(name)))
    _see_everything(inputs)
    outputs = []
    for name in names:
        tensor = inputs.get(name)
        if tensor is None:
            aliased = engine.get_aliased_input_tensor(name)
            kind = _torch_type(engine.get_tensor_dtype(name))
            tensor = inputs[aliased] if aliased else _filled(tuple(context.get_tensor_shape(name)), kind)
            outputs.append(tensor)
        context.set_tensor_address(name, tensor.data_ptr())
    return inputs, outputs


def _filled(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
    """Makes random numbers, and zeros for ids and indices."""
    if kind.is_floating_point and kind.itemsize > 1:
        return torch.randn(shape, device="cuda").to(kind)
    return torch.zeros(shape, device="cuda", dtype=kind)


def _see_everything(inputs: dict[str, Tensor]) -> None:
    """Lets every token read all image tokens: with ranges of zeros, cross-attention would have no work."""
    if "cross_ranges" in inputs:
        inputs["cross_ranges"][..., 1] = inputs["cross_key.0"].shape[2]


def _torch_type(kind: Any) -> torch.dtype:
    """Translates a tensorrt.DataType. Raises NotAvailableError for types that are not timed."""
    names = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8_e4m3fn", "INT32": "int32"}
    names |= {"INT64": "int64", "INT8": "int8", "UINT8": "uint8", "BOOL": "bool"}
    if kind.name not in names:
        raise NotAvailableError(f"tensors of {kind.name} are not timed")
    return getattr(torch, names[kind.name])
