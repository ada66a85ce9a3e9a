"""The record of a TensorRT engine in the manifest."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError


class TensorRtRecord(BaseModel):
    """Names the GPUs an engine runs on, and how its plans are fed."""

    model_config = ConfigDict(extra="forbid")

    version: str  # version of TensorRT: only this version reads the plans
    capability: int  # compute capability of the GPU: 90 for 9.0
    gpu: str
    container: str  # a container with this TensorRT
    dtype: str  # "fp32", "fp16" or "bf16": the type of everything that is not quantised
    plugin: str  # name and version of the plugin for cross-attention
    aliased: dict[str, str]  # output of the decoder -> the input whose memory it shares
    # stage -> for each optimisation profile, input -> smallest, usual and largest shape
    profiles: dict[str, list[dict[str, list[list[int]]]]]
    stripped: bool = False  # True: the weights are in the ONNX files beside the plans
    weight_streaming: bool = False


def record_of(engine: Engine) -> TensorRtRecord:
    """Return the record of an engine. Raises EngineError if it is missing or incomplete."""
    try:
        return TensorRtRecord.model_validate(engine.manifest.backend_record)
    except ValidationError:
        raise EngineError(
            f"engine {engine.path} does not say what it was built for; rebuild it with `nvlm-trt build`"
        ) from None
