"""The running side of TensorRT and TensorRT-RTX, played by ONNX Runtime behind doubles of the real classes, for a
process without a GPU. A plan is the ONNX graph with its profiles; device memory is host memory.

Real: every class, enumeration and signature that the product touches.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from real_signatures import Double

GPU = "a GPU made of paper"
_NUMPY = {"FLOAT": np.float32, "INT32": np.int32, "INT64": np.int64}


def pack_plan(profiles: Any, graph: Any) -> Iterator[bytes]:
    """Yields the parts of a plan that `PlanMachine.deserialize` reads: its profiles, and an ONNX file with weights."""
    yield json.dumps(profiles).encode()
    yield b"\n"
    yield onnx.load(graph).SerializeToString()


class PlanMachine:
    """Makes the doubles of one run: `trt` is the module with the real classes."""

    trt: Any

    def __init__(self) -> None:
        self.events: list[str] = []
        self.capturing: list[Callable[[], None]] | None = None

    def deserialize(self, data: Any) -> Double | None:
        header, _, model = bytes(data).partition(b"\n")
        return self.engine(json.loads(header), model) if model else None

    def engine_answers(self, make_context: Callable[[], Double]) -> dict[str, Any]:
        """Returns the answers of an ICudaEngine that the two rooms ask for in their own ways."""
        raise NotImplementedError

    def context_answers(self) -> dict[str, Any]:
        return {}

    def engine(self, profiles: list[dict[str, Any]], model: bytes) -> Double:
        trt = self.trt
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        graph = onnx.load_from_string(model).graph
        updates = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "TRT_KVCacheUpdate"}
        inputs, outputs = [v.name for v in graph.input], [v.name for v in graph.output]
        names = [*inputs, *outputs]
        mode = trt.TensorIOMode
        return Double(
            trt.ICudaEngine,
            num_io_tensors=len(names),
            get_tensor_name=lambda index: names[index],
            get_tensor_mode=lambda name: mode.INPUT if name in inputs else mode.OUTPUT,
            get_aliased_input_tensor=updates.get,
            device_memory_size_v2=1000,
            get_weight_streaming_automatic_budget=lambda: self.events.append("streaming budget 123") or 123,
            **self.engine_answers(lambda: self.context(session, graph, profiles, updates)),
        )

    def context(self, session: Any, graph: Any, profiles: list[dict[str, Any]], aliases: dict[str, str]) -> Double:
        trt = self.trt
        shapes: dict[str, tuple[int, ...]] = {}
        addresses: dict[str, int] = {}
        types = {v.name: _NUMPY[tensor_double(trt, v).dtype.name] for v in (*graph.input, *graph.output)}
        chosen: list[int] = []

        def set_shape(name: str, shape: tuple[int, ...]) -> bool:
            low, _, high = profiles[chosen[-1]][name]
            fits = all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
            if fits:
                shapes[name] = shape
            return fits

        def run() -> dict[str, np.ndarray]:
            feeds = {v.name: _at(addresses[v.name], shapes[v.name], types[v.name]).copy() for v in graph.input}
            names = [v.name for v in graph.output]
            return dict(zip(names, session.run(names, feeds), strict=True))

        def execute(stream_handle: int) -> bool:
            def step() -> None:
                for name, array in run().items():
                    assert name not in aliases or addresses[name] == addresses[aliases[name]], f"{name} is not in place"
                    _at(addresses[name], array.shape, types[name])[...] = array

            if self.capturing is None:
                step()
            else:
                self.capturing.append(step)
            return True

        return Double(
            trt.IExecutionContext,
            set_optimization_profile_async=lambda index, stream: chosen.append(index) or True,
            set_input_shape=set_shape,
            set_tensor_address=lambda name, address: addresses.__setitem__(name, address) or True,
            infer_shapes=lambda: [v.name for v in graph.input if v.name not in shapes],
            get_tensor_shape=lambda name: trt.Dims(run()[name].shape),
            execute_async_v3=execute,
            **self.context_answers(),
        )

    def torch(self) -> Any:
        """Returns a torch whose CUDA streams and graphs are synchronous and on the host."""
        machine = self

        class CudaGraph:
            def __init__(self) -> None:
                self.steps: list[Callable[[], None]] = []

            def replay(self) -> None:
                machine.events.append("replay")
                for step in self.steps:
                    step()

        @contextlib.contextmanager
        def graph(cuda_graph: CudaGraph, stream: Any, capture_error_mode: str) -> Iterator[None]:
            machine.capturing = cuda_graph.steps
            yield
            machine.capturing = None

        used = ("Stream", "stream", "CUDAGraph", "graph", "empty_cache", "current_stream")
        for name in (*used, "get_device_capability", "get_device_name"):
            assert hasattr(torch.cuda, name)
        assert hasattr(torch.cuda.Stream, "synchronize")
        inspect.signature(torch.cuda.graph).bind("graph", stream="stream", capture_error_mode="thread_local")
        cuda = SimpleNamespace(
            Stream=lambda device: SimpleNamespace(cuda_stream=7, synchronize=lambda: None),
            stream=contextlib.nullcontext,
            CUDAGraph=CudaGraph,
            graph=graph,
            empty_cache=lambda: None,
            current_stream=lambda device: SimpleNamespace(synchronize=lambda: machine.events.append("synchronised")),
        )
        names = ("empty", "zeros", "stack", "cat", "from_dlpack", "from_numpy")
        types = ("uint8", "int32", "int64", "float32", "float16", "bfloat16")
        members = {name: getattr(torch, name) for name in (*names, *types, "OutOfMemoryError")}
        return SimpleNamespace(cuda=cuda, **members)


def tensor_double(trt: Any, value: onnx.ValueInfoProto) -> Double:
    tensor = value.type.tensor_type
    kinds = {"FLOAT": "FLOAT", "FLOAT16": "HALF", "BFLOAT16": "BF16", "INT32": "INT32", "INT64": "INT64"}
    kind = getattr(trt.DataType, kinds[onnx.TensorProto.DataType.Name(tensor.elem_type)])
    shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
    return Double(trt.ITensor, name=value.name, dtype=kind, shape=shape, is_shape_tensor=False)


def _at(address: int, shape: Any, dtype: Any) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)
