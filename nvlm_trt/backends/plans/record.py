"""The record of an engine of plans in the manifest: how the plans are fed. Each backend adds what its plans run on."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from nvlm_trt.model.config import NvlmConfig


class PlanRecord(BaseModel):
    """Says how the plans of an engine are fed."""

    model_config = ConfigDict(extra="forbid")

    dtype: str  # "fp32", "fp16" or "bf16": the type of everything that is not quantised
    aliased: dict[str, str]  # output of the decoder -> the input whose memory it shares
    # stage -> for each optimisation profile, input -> smallest, usual and largest shape
    profiles: dict[str, list[dict[str, list[list[int]]]]]
    weight_streaming: bool = False  # True: weights that do not fit on the GPU stay in host memory


def aliases(config: NvlmConfig) -> dict[str, str]:
    """Return each output of the decoder that shares the memory of an input -> that input."""
    layers = range(config.llm.num_layers)
    return {f"present_{kind}.{i}": f"past_{kind}.{i}" for i in layers for kind in ("key", "value")}
