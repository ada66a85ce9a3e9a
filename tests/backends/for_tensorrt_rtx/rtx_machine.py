"""A machine with a GPU for TensorRT-RTX, played by ONNX Runtime behind doubles of the real classes (plan_machine.py).

The builder is left out: a plan made here is the ONNX graph of the stage behind a header of 64 bytes, in fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from plan_machine import GPU, PlanMachine, pack_plan
from real_signatures import Double, constructor

from nvlm_trt.backends import tensorrt_rtx as room
from nvlm_trt.backends.tensorrt_rtx import build, runtime
from nvlm_trt.builders.build_steps import BuildJob
from nvlm_trt.builders.engine_build import build_engine, write_engine
from nvlm_trt.builders.quantization.formats import quantised
from nvlm_trt.builders.source import EngineSource
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.engine import Engine
from nvlm_trt.progress import no_progress

# the tests that use this module are skipped without TensorRT-RTX
tensorrt_rtx_bindings = pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra tensorrt-rtx")
trt = tensorrt_rtx_bindings.tensorrt_rtx

HEADER = b"vtrt" + bytes(60)
LIMITS = {"max_slots": 3, "max_seq_len": 256}


class RtxMachine(PlanMachine):
    """Patches TensorRT-RTX's runtime and the parts of torch.cuda that the product uses.

    What a test wants of the GPU, it sets; what the product did, it reads from `events`, `contexts` and `offered`."""

    trt = trt

    def __init__(self, capability: tuple[int, int] = (8, 9), driver: str = "580.65.06") -> None:
        super().__init__()
        self.capability, self.driver = capability, driver
        self.validity: tuple[Any, int] = (trt.EngineValidity.VALID, 0)
        self.capturable = True
        self.takes_caches = True
        self.compiled = b"kernels of this GPU"  # what a runtime cache serialises
        self.contexts: list[dict[str, Any]] = []  # the runtime configuration of each context
        self.offered: list[bytes] = []  # runtime caches that the product read

    @contextlib.contextmanager
    def patched(self, cache: Path) -> Iterator[RtxMachine]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(cache))
            patch.setattr(room, "DEVICE", "cpu")
            patch.setattr(build, "PREFILL_CHUNK", 16)
            patch.setattr(build, "find_gpu", lambda targets: GPU)
            patch.setattr(build, "build_plan", write_graph_as_plan)
            patch.setattr(runtime, "import_torch", self.torch)
            patch.setattr(runtime, "driver_version", lambda: self.driver)
            patch.setattr(tensorrt_rtx_bindings, "Runtime", constructor(trt.Runtime, self.runtime))
            yield self

    def runtime(self, logger: Any) -> Double:
        def validity(header: bytes) -> tuple[Any, int]:
            assert header == HEADER
            self.events.append("asked")
            return self.validity

        def deserialize(data: Any) -> Double | None:
            self.events.append("deserialised")
            return self.deserialize(bytes(data)[len(HEADER) :])

        answers = {"engine_header_size": len(HEADER), "get_engine_validity": validity}
        return Double(trt.Runtime, deserialize_cuda_engine=deserialize, **answers)

    def engine_answers(self, make_context: Callable[[], Double]) -> dict[str, Any]:
        def create_context(config: Any) -> Double:
            self.contexts.append(dict(config._answers))
            return make_context()

        return {"create_runtime_config": self.runtime_config, "create_execution_context": create_context}

    def context_answers(self) -> dict[str, Any]:
        return {"is_stream_capturable": lambda stream: self.capturable}

    def runtime_config(self) -> Double:
        config: Double

        def deserialize(blob: Any) -> bool:
            self.offered.append(bytes(blob))
            return self.takes_caches

        def note(name: str) -> Callable[[Any], bool]:
            return lambda value: config._answers.__setitem__(name, value) or True

        cache = Double(trt.IRuntimeCache, serialize=lambda: self.compiled, deserialize=deserialize)
        config = Double(
            trt.IRuntimeConfig,
            create_runtime_cache=lambda: cache,
            set_runtime_cache=note("runtime cache"),
            set_execution_context_allocation_strategy=note("allocation"),
        )
        return config

    def torch(self) -> Any:
        torch = super().torch()
        torch.cuda.get_device_capability = lambda device: self.capability
        torch.cuda.get_device_name = lambda device: GPU
        return torch


def write_graph_as_plan(
    graph: Path, plan: Path, profiles: Sequence[Any], options: Any, fuse: bool, expected: int
) -> bool:
    """Stands for `build_plan`."""
    plan.write_bytes(HEADER + b"".join(pack_plan(list(profiles), graph)))
    return fuse


def build_in_fp32(checkpoint: Path, output: Path, smoke_test: bool = False, **options: Any) -> Engine:
    return build_engine(
        checkpoint, output, LIMITS, precision="fp32", backend="tensorrt-rtx", smoke_test=smoke_test, options=options
    )


def build_for_cpu(checkpoint: Path, output: Path, precision: str) -> Engine:
    """Writes the engine that a build without a GPU tries in the place of its plans."""
    output.mkdir()
    source = EngineSource(checkpoint, LIMITS)
    job = BuildJob(source, {"target": None, "weight_streaming": False}, output, output, no_progress)
    steps = room.SPEC.build(job).trial
    assert steps is not None
    precisions = room.SPEC.precisions.parse(precision)
    with Checkpoint.open(checkpoint) as weights:
        recipe = quantised(weights, precisions, None, 0, steps.weight_form)
    write_engine(source, output, recipe, room.NAME, steps.tools, steps.write_stages)
    return Engine.open(output)
