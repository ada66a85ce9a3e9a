"""fp8 without a calibration: one range for all activations, in every layer that a calibration would measure."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine
from nvlm_trt.builders.quantization.calibration import read_calibration
from nvlm_trt.builders.quantization.fixed_range import fixed_calibration
from nvlm_trt.errors import EngineError
from nvlm_trt.model.presets import PRESETS

Directory = Callable[[str], Path]


@pytest.mark.parametrize("name", ["nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny"])
def test_covers_the_layers_that_a_calibration_measures(calibration_file: Directory, name: str) -> None:
    measured = read_calibration(calibration_file(name)).linears
    fixed = fixed_calibration(PRESETS[name], "digest", 448.0).linears
    assert fixed.keys() == measured.keys()
    for layer, linear in fixed.items():
        assert len(linear.channels) == len(measured[layer].channels)
        assert {linear.abs_max, linear.clip, *linear.channels} == {448.0}


def test_a_tied_head_is_covered() -> None:
    fixed = fixed_calibration(PRESETS["nvlm-d-small"], "digest", 1.0).linears
    assert len(fixed["language_model.model.embed_tokens"].channels) == PRESETS["nvlm-d-small"].llm.hidden_size


def test_an_engine_gets_the_scale(checkpoint: Directory, tmp_path: Path) -> None:
    options = QuantizationOptions(activation_range=896.0, gate=None)
    engine = build_engine(checkpoint("nvlm-h-tiny"), tmp_path / "engine", precision="fp8", quantization=options)
    assert engine.manifest.calibration == {"samples": {"activation_range": 896.0}}
    model = onnx.load(engine.path / "decoder.onnx", load_external_data=True)
    scales = [
        numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name.endswith("input_scale")
    ]
    assert len(scales) > 20
    np.testing.assert_array_equal(scales, 2.0)
    saved = tmp_path / "engine" / "calibration.json"
    again = QuantizationOptions(calibration=saved, gate=None)
    other = build_engine(checkpoint("nvlm-h-tiny"), tmp_path / "other", precision="fp8", quantization=again)
    assert other.manifest.files == engine.manifest.files


@pytest.mark.parametrize("largest", [0.0, -1.0, math.nan, math.inf])
def test_a_range_is_a_magnitude(largest: float) -> None:
    with pytest.raises(EngineError, match="--activation-range .* is no magnitude"):
        QuantizationOptions(activation_range=largest)


def test_excludes_a_calibration(checkpoint: Directory, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="stands for a calibration"):
        QuantizationOptions(activation_range=448.0, calibration_samples=3)
    options = QuantizationOptions(activation_range=448.0, gate=None)
    with pytest.raises(EngineError, match="is for fp8; int8 needs a calibration"):
        build_engine(checkpoint("nvlm-d-tiny"), tmp_path / "engine", precision="int8", quantization=options)
    assert not list(tmp_path.iterdir())
