"""TensorRT's builder and runtime, played by ONNX Runtime behind doubles of the real classes, for a process that has
TensorRT's bindings and no GPU. A plan is the ONNX graph with its profiles; device memory is host memory.

Real: every class, enumeration and signature that the product touches, polygraphy, the plugin's registration.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from plan_machine import GPU, PlanMachine, pack_plan, tensor_double
from real_signatures import Double, constructor

CAPABILITY = 90


class Machine(PlanMachine):
    """Patches `tensorrt` and the parts of torch.cuda that the product uses, as a process with a GPU has them."""

    def __init__(self) -> None:
        super().__init__()
        self.refuse_to_build: str | None = None  # the error that TensorRT logs

    @contextlib.contextmanager
    def patched(self, cache: Path) -> Iterator[Machine]:
        import tensorrt as trt
        import tensorrt_bindings.tensorrt

        from nvlm_trt.backends import tensorrt as room
        from nvlm_trt.backends.tensorrt import build as tensorrt_engine
        from nvlm_trt.backends.tensorrt import runtime as tensorrt_runtime
        from nvlm_trt.backends.tensorrt import target as tensorrt_target

        self.trt = tensorrt_bindings.tensorrt
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
            for part in pack_plan([self.shapes_of[id(p)] for p in profiles], self.graph):
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
            inputs = [tensor_double(trt, value) for value in graph.input]
            layer = Double(trt.ILayer, type=trt.LayerType.PLUGIN_V3)
            network._answers.update(num_layers=plugins, get_layer=lambda index: layer)
            network._answers.update(num_inputs=len(inputs), get_input=lambda index: inputs[index])
            return True

        return Double(trt.OnnxParser, parse_from_file=parse, num_errors=0)

    # --- running -----------------------------------------------------------------------------------------------------

    def runtime(self, logger: Any) -> Double:
        import tensorrt_bindings.tensorrt as trt

        return Double(trt.Runtime, deserialize_cuda_engine=self.deserialize)

    def engine_answers(self, make_context: Callable[[], Double]) -> dict[str, Any]:
        return {"create_execution_context": lambda strategy: make_context()}

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
