"""The record of a TensorRT engine in the manifest."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError


class TensorRtRecord(BaseModel):
    """Names the GPUs an engine runs on, and how its plans are fed."""

    model_config = ConfigDict(extra="forbid")

    version: str  # of TensorRT, which reads its own plans only
    capability: int  # compute capability of the GPU: 90 for 9.0
    gpu: str
    container: str  # that has this version
    dtype: str  # "fp32", "fp16" or "bf16", of everything that is not quantised
    plugin: str  # name and version of the plugin that cross-attends
    aliased: dict[str, str]  # output of the decoder -> the input whose memory it is
    # stage -> for each optimisation profile, input -> smallest, usual and largest shape
    profiles: dict[str, list[dict[str, list[list[int]]]]]
    stripped: bool = False  # weights are in the ONNX files beside the plans
    weight_streaming: bool = False


def record_of(engine: Engine) -> TensorRtRecord:
    """Raises EngineError for an engine without a record, or with one that is not whole."""
    try:
        return TensorRtRecord.model_validate(engine.manifest.backend_record)
    except ValidationError:
        raise EngineError(
            f"engine {engine.path} does not say what it was built for; rebuild it with `nvlm-trt build`"
        ) from None
