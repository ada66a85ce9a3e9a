"""Says whether this machine can calibrate with the whole model in memory."""

from __future__ import annotations

from nvlm_trt.backends.table import DEFAULT_BACKEND, find_backend
from nvlm_trt.builders.quantization.formats import OBSERVING
from nvlm_trt.builders.source import EngineSource
from nvlm_trt.machine import available_memory
from nvlm_trt.planner.memory import plan_engine


def whole_model_fits(source: EngineSource) -> bool:
    """Whether this machine's free memory holds the whole model in fp32."""
    design = source.design(find_backend(DEFAULT_BACKEND), OBSERVING.precisions)
    return plan_engine(design).peak_building < available_memory()
