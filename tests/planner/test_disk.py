"""The disk space of a build: what its files take, and what stands beside them at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lab.build_memory import write_calibration
from nvlm_trt.backends.table import find_backend
from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.precision import components_of
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.planner.disk import disk_of_build
from nvlm_trt.planner.limits import default_limits

Directory = Callable[[str], Path]
TAG_LENGTH = 1


def planned(preset: str, precision: str, limits: EngineLimits, backend: str = "onnxruntime", **others: object) -> int:
    spec, config = find_backend(backend), PRESETS[preset]
    chosen = spec.precisions.parse(precision)
    precisions = {name: chosen[name] for name in components_of(config)}
    design = EngineDesign(config, limits, precisions, spec, TAG_LENGTH)
    return disk_of_build(design, **others)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["bf16", "fp32", "int8-weight-only", "int4-weight-only", "int8,lm_head=int8"])
@pytest.mark.parametrize("preset", ["nvlm-d-tiny", "nvlm-h-tiny"])
def test_an_engine_takes_what_is_planned(checkpoint: Directory, tmp_path: Path, preset: str, precision: str) -> None:
    calibration = tmp_path / "calibration.json"
    write_calibration(calibration, checkpoint(preset))
    options = QuantizationOptions(calibration if "int8," in precision else None, gate=None)
    engine = build_engine(
        checkpoint(preset), tmp_path / "engine", precision=precision, smoke_test=False, quantization=options
    )
    files = {name: record.size for name, record in engine.manifest.files.items()}
    stored = sum(size for name, size in files.items() if name.endswith(".onnx.data"))
    assert planned(preset, precision, engine.limits) == pytest.approx(stored, rel=0.02)


def test_what_stands_beside_the_engine_counts() -> None:
    preset = "nvlm-d-72b"
    config, limits = PRESETS[preset], default_limits(PRESETS[preset], TAG_LENGTH)
    names = components_of(config)
    alone = planned(preset, "int8", limits)
    whole = planned(preset, "fp32", limits)
    plain = dict.fromkeys(names, "fp32")
    assert 90e9 < alone < 110e9
    assert 310e9 < whole < 325e9
    assert planned(preset, "int8", limits, unquantised=plain) == alone + whole
    assert planned(preset, "int8", limits, calibrates=True) == whole
    assert planned(preset, "int8", limits, tries_another=True) == 2 * alone
    graphs = planned(preset, "bf16", limits, "tensorrt-rtx")
    assert graphs == planned(preset, "bf16", limits, "tensorrt-rtx", tries_another=True)
    assert 310e9 < graphs < 325e9  # graphs and plans
