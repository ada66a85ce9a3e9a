"""Decides what a calibration has in memory: one layer at a time, or the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from nvlm_trt.backends.table import DEFAULT_BACKEND, find_backend
from nvlm_trt.builders.quantization.formats import OBSERVING
from nvlm_trt.builders.quantization.part_store import calibration_folder
from nvlm_trt.builders.source import EngineSource
from nvlm_trt.machine import available_memory
from nvlm_trt.planner.memory import plan_engine

CalibrateBy = Literal["layer", "layer-on-gpu", "model"]  # one layer, on the CPU or on a GPU, or the whole model


def calibrates_by(source: EngineSource, output: Path) -> CalibrateBy:
    """Choose for the engine `output`, if the user does not: the whole model in fp32 if the free memory holds it."""
    if calibration_folder(output).exists():  # what a killed build has measured is used even if there is more memory now
        return "layer"
    design = source.design(find_backend(DEFAULT_BACKEND), OBSERVING.precisions)
    return "model" if plan_engine(design).peak_building < available_memory() else "layer"
