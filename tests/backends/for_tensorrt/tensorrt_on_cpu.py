"""TensorRT's builder and runtime, played by ONNX Runtime behind doubles of the real classes, for a process that has
TensorRT's bindings and no GPU. A plan is the ONNX graph with its profiles; device memory is host memory.

Real: every class, enumeration and signature that the product touches, polygraphy, the plugin's registration.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from real_signatures import Double, constructor

GPU = "a GPU made of paper"
CAPABILITY = 90
_NUMPY = {"FLOAT": np.float32, "INT32": np.int32, "INT64": np.int64}


class Machine:
    """Patches `tensorrt` and the parts of torch.cuda that the product uses, as a process with a GPU has them."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.capturing: list[Callable[[], None]] | None = None
        self.refuse_to_build: str | None = None  # the error that TensorRT logs

    @contextlib.contextmanager
    def patched(self, cache: Path) -> Iterator[Machine]:
        import tensorrt as trt

        from nvlm_trt.backends import tensorrt as room
        from nvlm_trt.backends.tensorrt import build as tensorrt_engine
        from nvlm_trt.backends.tensorrt import runtime as tensorrt_runtime
        from nvlm_trt.backends.tensorrt import target as tensorrt_target

        target = tensorrt_target.Target(trt.__version__, CAPABILITY, GPU)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(cache))
            patch.setattr(room, "DEVICE", "cpu")
            # keep the real classes: doubles are checked against them
            made = {"Builder": self.builder, "OnnxParser": self.parser, "Runtime": self.runtime}
            made |= {"Refitter": self.refitter, "OnnxParserRefitter": self.parser_refitter}
            for name, make in made.items():
                patch.setattr(trt, name, constructor(getattr(trt, name), make))
            for module in (tensorrt_engine, tensorrt_runtime, tensorrt_target):
                patch.setattr(module, "find_target", lambda *_: target)
            patch.setattr(tensorrt_runtime, "import_torch", lambda: self.torch())
            yield self

    # --- building ----------------------------------------------------------------------------------------------------

    def builder(self, logger: Any) -> Double:
        import tensorrt_bindings.tensorrt as trt

        profiles: list[Double] = []
        flags: list[str] = []

        def network(flags: int = 0) -> Double:
            assert flags == 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            self.network = Double(trt.INetworkDefinition, num_inputs=0)
            return self.network

        def profile() -> Double:
            shapes: dict[str, list[list[int]]] = {}

            def set_shape(input: str, min: Any, opt: Any, max: Any) -> None:
                shapes[input] = [list(min), list(opt), list(max)]

            made = Double(trt.IOptimizationProfile, set_shape=set_shape)
            self.shapes_of = {**getattr(self, "shapes_of", {}), id(made): shapes}
            return made

        def config() -> Double:
            timing = Double(trt.ITimingCache, serialize=lambda: b"timings")
            return Double(
                trt.IBuilderConfig,
                create_timing_cache=lambda data: self.events.append(f"timing cache of {len(data)} bytes") or timing,
                get_timing_cache=lambda: timing,
                set_flag=lambda flag: flags.append(flag.name),
                add_optimization_profile=lambda made: profiles.append(made) or len(profiles) - 1,
            )

        def build(network: Any, config: Any, writer: Any) -> bool:
            assert config._answers["profiling_verbosity"] == trt.ProfilingVerbosity.DETAILED
            self.events.append(f"built {self.graph.stem} {' '.join(sorted(flags))}".strip())
            if self.refuse_to_build:
                logger.log(trt.ILogger.WARNING, "a warning is not the reason")
                logger.log(trt.ILogger.ERROR, self.refuse_to_build)
                return False
            header = json.dumps([self.shapes_of[id(p)] for p in profiles]).encode()
            for part in (header, b"\n", onnx.load(self.graph).SerializeToString()):
                assert writer.write(part) == len(part)
            return True

        made = Double(
            trt.Builder,
            create_network=network,
            create_builder_config=config,
            create_optimization_profile=profile,
            build_serialized_network_to_stream=build,
        )
        return made

    def parser(self, network: Any, logger: Any) -> Double:
        import tensorrt_bindings.tensorrt as trt

        def parse(path: str) -> bool:
            self.graph = Path(path)
            graph = onnx.load(path, load_external_data=False).graph
            plugins = sum(node.op_type == "GatedCrossAttention" for node in graph.node)
            inputs = [_tensor(trt, value) for value in graph.input]
            layer = Double(trt.ILayer, type=trt.LayerType.PLUGIN_V3)
            network._answers.update(num_layers=plugins, get_layer=lambda index: layer)
            network._answers.update(num_inputs=len(inputs), get_input=lambda index: inputs[index])
            return True

        return Double(trt.OnnxParser, parse_from_file=parse, num_errors=0)

    # --- running -----------------------------------------------------------------------------------------------------

    def runtime(self, logger: Any) -> Double:
        import tensorrt_bindings.tensorrt as trt

        def deserialize(data: Any) -> Double | None:
            header, _, model = bytes(data).partition(b"\n")
            return self.engine(json.loads(header), model) if model else None

        return Double(trt.Runtime, deserialize_cuda_engine=deserialize)

    def refitter(self, engine: Any, logger: Any) -> Double:
        import tensorrt_bindings.tensorrt as trt

        return Double(trt.Refitter)

    def parser_refitter(self, refitter: Any, logger: Any) -> Double:
        import tensorrt_bindings.tensorrt as trt

        def refit(path: str) -> bool:
            assert Path(f"{path}.data").exists()
            self.events.append(f"refitted {Path(path).name}")
            return True

        return Double(trt.OnnxParserRefitter, refit_from_file=refit, num_errors=0)

    def engine(self, profiles: list[dict[str, Any]], model: bytes) -> Double:
        import tensorrt_bindings.tensorrt as trt

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
            create_execution_context=lambda strategy: self.context(session, graph, profiles, updates),
        )

    def context(self, session: Any, graph: Any, profiles: list[dict[str, Any]], aliases: dict[str, str]) -> Double:
        import tensorrt_bindings.tensorrt as trt

        shapes: dict[str, tuple[int, ...]] = {}
        addresses: dict[str, int] = {}
        types = {v.name: _NUMPY[_tensor(trt, v).dtype.name] for v in (*graph.input, *graph.output)}
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


def _tensor(trt: Any, value: onnx.ValueInfoProto) -> Double:
    tensor = value.type.tensor_type
    kinds = {"FLOAT": "FLOAT", "FLOAT16": "HALF", "BFLOAT16": "BF16", "INT32": "INT32", "INT64": "INT64"}
    kind = getattr(trt.DataType, kinds[onnx.TensorProto.DataType.Name(tensor.elem_type)])
    shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
    return Double(trt.ITensor, name=value.name, dtype=kind, shape=shape, is_shape_tensor=False)


def _at(address: int, shape: Any, dtype: Any) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)
