"""The record of a TensorRT-RTX engine in the manifest."""

from __future__ import annotations

from typing import Literal

from nvlm_trt.backends.plans.record import PlanRecord
from nvlm_trt.engine import Engine, read_record


class RtxRecord(PlanRecord):
    """Names the GPUs an engine runs on, and how its plans are fed."""

    version: str  # version of TensorRT-RTX: only this version reads the plans
    targets: list[str]  # as "sm89"; none: TensorRT-RTX's default targets
    # stage with attention -> whether every attention has a fused kernel on every target
    fused: dict[str, bool]
    # "onnx": temporary engines of a build without a GPU, which ONNX Runtime runs
    form: Literal["plan", "onnx"] = "plan"
    tried_on: str  # the GPU that ran the plans before they were published, or the CPU, which ran the graphs


def record_of(engine: Engine) -> RtxRecord:
    """Return the record of an engine. Raises EngineError if it is missing or incomplete."""
    return read_record(engine, RtxRecord)
