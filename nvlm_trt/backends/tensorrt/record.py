"""The record of a TensorRT engine in the manifest."""

from __future__ import annotations

from nvlm_trt.backends.plans.record import PlanRecord
from nvlm_trt.engine import Engine, read_record


class TensorRtRecord(PlanRecord):
    """Names the GPUs an engine runs on, and how its plans are fed."""

    version: str  # version of TensorRT: only this version reads the plans
    capability: int  # compute capability of the GPU: 90 for 9.0
    gpu: str
    container: str  # a container with this TensorRT
    plugin: str | None  # name and version of the plugin for cross-attention; None: the decoder has no plugin
    stripped: bool = False  # True: the weights are in the ONNX files beside the plans


def record_of(engine: Engine) -> TensorRtRecord:
    """Return the record of an engine. Raises EngineError if it is missing or incomplete."""
    return read_record(engine, TensorRtRecord)
