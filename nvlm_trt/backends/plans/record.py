"""The record of an engine of plans in the manifest: how the plans are fed. Each backend adds what its plans run on."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError
from nvlm_trt.model.config import NvlmConfig


class PlanRecord(BaseModel):
    """Says how the plans of an engine are fed."""

    model_config = ConfigDict(extra="forbid")

    dtype: str  # "fp32", "fp16" or "bf16": the type of everything that is not quantised
    aliased: dict[str, str]  # output of the decoder -> the input whose memory it shares
    # stage -> for each optimisation profile, input -> smallest, usual and largest shape
    profiles: dict[str, list[dict[str, list[list[int]]]]]
    weight_streaming: bool = False  # True: weights that do not fit on the GPU stay in host memory


Record = TypeVar("Record", bound=PlanRecord)


def read_record(engine: Engine, kind: type[Record]) -> Record:
    """Return the record of an engine. Raises EngineError if it is missing or incomplete."""
    try:
        return kind.model_validate(engine.manifest.backend_record)
    except ValidationError:
        raise EngineError(
            f"engine {engine.path} does not say what it was built for; rebuild it with `nvlm-trt build`"
        ) from None


def aliases(config: NvlmConfig) -> dict[str, str]:
    """Return each output of the decoder that shares the memory of an input -> that input."""
    layers = range(config.llm.num_layers)
    return {f"present_{kind}.{i}": f"past_{kind}.{i}" for i in layers for kind in ("key", "value")}
