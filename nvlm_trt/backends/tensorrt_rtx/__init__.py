"""Describes the backend TensorRT-RTX: plans for RTX GPUs, built from pip packages, with or without a GPU."""

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

NAME = "tensorrt-rtx"
DEVICE = "cuda"

# fp32 is for tests: no attention kernel is fused in it.
# fmt: off
PRECISIONS = PrecisionTable(NAME, default="bf16", names={
    # name               vision_encoder projector decoder             lm_head             cross_attention
    "bf16":             ("bf16",        "bf16",   "bf16",             "bf16",             "bf16"),
    "fp16":             ("fp16",        "fp16",   "fp16",             "fp16",             "fp16"),
    "fp32":             ("fp32",        "fp32",   "fp32",             "fp32",             "fp32"),
    "int8":             ("bf16",        "bf16",   "int8",             "bf16",             "int8"),
    "fp8":              ("bf16",        "bf16",   "fp8",              "bf16",             "fp8"),
    "int8-weight-only": ("bf16",        "bf16",   "int8-weight-only", "int8-weight-only", "int8-weight-only"),
    "int4-weight-only": ("bf16",        "bf16",   "int4-weight-only", "int8-weight-only", "int4-weight-only"),
})
# fmt: on


def _host_building(stages: Sequence[StageWeights], parameters: int, calibrated: bool) -> int:
    from nvlm_trt.backends.tensorrt_rtx.memory import host_building

    return host_building(stages, parameters)


def _probe() -> str:
    from nvlm_trt.backends.tensorrt_rtx.target import import_rtx

    return f"TensorRT-RTX {import_rtx().__version__}"


def _check_options(options: Mapping[str, Any], precisions: Mapping[str, str]) -> None:
    from nvlm_trt.backends.tensorrt_rtx.options import RtxOptions
    from nvlm_trt.backends.tensorrt_rtx.target import check_precisions

    check_precisions(RtxOptions.read(options).targets, precisions)


def _check_limits(config: NvlmConfig, limits: EngineLimits, precisions: Mapping[str, str]) -> None:
    from nvlm_trt.backends.plans.cache_rows import check_rows

    check_rows(config.llm, limits, precisions)


def _open(engine: Engine, stages: Collection[str], options: OpenOptions) -> StepBackend:
    from nvlm_trt.backends.tensorrt_rtx.record import record_of

    record = record_of(engine)
    if record.form == "onnx":
        from nvlm_trt.backends.tensorrt_rtx.on_cpu import GraphsOnCpu

        return GraphsOnCpu(engine, stages, options.threads)
    from nvlm_trt.backends.plans.backend import PlanBackend
    from nvlm_trt.backends.tensorrt_rtx.runtime import RtxRuntime

    device = options.device or DEVICE
    return PlanBackend(engine, stages, device, record, RtxRuntime(engine, record, device))


def _build(job: BuildJob) -> BuildSteps:
    from nvlm_trt.backends.tensorrt_rtx.build import RtxSteps

    return RtxSteps(job)


def _placement(engine: Engine) -> TritonPlacement:
    """Let our python models run every stage: Triton has no backend for plans of TensorRT-RTX."""
    from nvlm_trt.backends.tensorrt_rtx.record import record_of

    most, *_ = record_of(engine).profiles["vision_encoder"][0]["pixel_values"][-1]  # [tiles, 3, E, E]
    return TritonPlacement(max_tiles=most)


def _describe(engine: Engine) -> Sequence[str]:
    from nvlm_trt.backends.tensorrt_rtx.record import record_of
    from nvlm_trt.backends.tensorrt_rtx.target import names_of

    record = record_of(engine)
    lines = [f"plans for compute capability {names_of(record.targets)}; tried on {record.tried_on}"]
    composed = [stage for stage, fused in record.fused.items() if not fused]
    if composed and record.dtype != "fp32":
        stages = ", ".join(composed)
        lines.append(f"warning: {stages}: no fused attention kernel, so attention keeps all scores in memory")
    return lines


SPEC = BackendSpec(
    name=NAME,
    summary="tensorrt-rtx (RTX GPUs, built with or without one, docs/tensorrt.md)",
    device=DEVICE,
    precisions=PRECISIONS,
    prefill_chunk=PREFILL_CHUNK,
    memory=MemoryModel(
        device="gpu",
        whole_cross_cache=True,
        standard_blocks=True,
        graphs_first=True,
        host_building=_host_building,
    ),
    probe=_probe,
    open=_open,
    build=_build,
    build_options={"target": None, "weight_streaming": False},
    check_options=_check_options,
    check_limits=_check_limits,
    placement=_placement,
    server_needs=lambda engine: ServerNeeds(extras=(NAME, "structured"), packages=("torch>=2.6",)),
    describe=_describe,
)
