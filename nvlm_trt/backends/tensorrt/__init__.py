"""Describes the backend TensorRT on a GPU, whose plans fit one version of TensorRT and one compute capability."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nvlm_trt.backends.plans import PREFILL_CHUNK
from nvlm_trt.backends.spec import (
    BackendSpec,
    MemoryModel,
    OpenOptions,
    ServerNeeds,
    StageWeights,
    TritonPlacement,
)
from nvlm_trt.model.precision import PrecisionTable

if TYPE_CHECKING:
    from nvlm_trt.backends.base import StepBackend
    from nvlm_trt.builders.build_steps import BuildJob, BuildSteps
    from nvlm_trt.engine import Engine
    from nvlm_trt.limits import EngineLimits
    from nvlm_trt.model.config import NvlmConfig

NAME = "tensorrt"
DEVICE = "cuda"

# An engine has one floating-point type. fp16 overflows where bf16 does not, so bf16 is the default.
# fmt: off
PRECISIONS = PrecisionTable(NAME, default="bf16", names={
    # name   vision_encoder projector decoder lm_head cross_attention
    "fp32": ("fp32",        "fp32",   "fp32", "fp32", "fp32"),
    "fp16": ("fp16",        "fp16",   "fp16", "fp16", "fp16"),
    "bf16": ("bf16",        "bf16",   "bf16", "bf16", "bf16"),
    "int8": ("bf16",        "bf16",   "int8", "bf16", "int8"),
    "fp8":  ("bf16",        "bf16",   "fp8",  "bf16", "fp8"),
})
# fmt: on


def _host_building(stages: Sequence[StageWeights], parameters: int, calibrated: bool) -> int:
    """Estimate the host memory of a build: the builder holds the weights of its network and those of the plan
    (developer guide, "The Build Phase"); a calibration runs on the CPU in fp32."""
    return max(*(2 * stage.nbytes for stage in stages), 4 * parameters if calibrated else 0)


def _probe() -> str:
    from nvlm_trt.backends.tensorrt.target import find_target

    target = find_target()
    return f"TensorRT {target.tensorrt} on {target.gpu}"


def _check_options(options: Mapping[str, Any], precisions: Mapping[str, str]) -> None:
    from nvlm_trt.backends.tensorrt.options import PlanOptions

    PlanOptions(**options)


def _check_limits(config: NvlmConfig, limits: EngineLimits, precisions: Mapping[str, str]) -> None:
    from nvlm_trt.backends.plans.cache_rows import check_rows

    check_rows(config.llm, limits, precisions)


def _open(engine: Engine, stages: Collection[str], options: OpenOptions) -> StepBackend:
    from nvlm_trt.backends.plans.backend import PlanBackend
    from nvlm_trt.backends.tensorrt.record import record_of
    from nvlm_trt.backends.tensorrt.runtime import TensorRtRuntime

    device = options.device or DEVICE
    return PlanBackend(engine, stages, device, record_of(engine), TensorRtRuntime(engine, device))


def _build(job: BuildJob) -> BuildSteps:
    from nvlm_trt.backends.tensorrt.build import TensorRtSteps

    return TensorRtSteps(job)


def _placement(engine: Engine) -> TritonPlacement:
    from nvlm_trt.backends.tensorrt.placement import placement

    return placement(engine)


def _server_needs(engine: Engine) -> ServerNeeds:
    from nvlm_trt.backends.tensorrt.record import record_of

    record = record_of(engine)
    packages = (f"tensorrt=={record.version}",)  # the Python API of the container's TensorRT
    index = "https://pypi.nvidia.com"
    return ServerNeeds(record.container, ("tensorrt", "structured"), packages, index, record.capability)


SPEC = BackendSpec(
    name=NAME,
    summary="tensorrt (the GPU of this machine, docs/tensorrt.md)",
    device=DEVICE,
    precisions=PRECISIONS,
    prefill_chunk=PREFILL_CHUNK,
    memory=MemoryModel(device="gpu", graphs_first=True, host_building=_host_building),
    probe=_probe,
    open=_open,
    build=_build,
    build_options={"strip_weights": False, "weight_streaming": False},
    check_options=_check_options,
    check_limits=_check_limits,
    placement=_placement,
    server_needs=_server_needs,
)
