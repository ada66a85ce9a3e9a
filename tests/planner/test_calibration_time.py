"""The estimate of a calibration's time, against FLOPs that are counted here from the shapes."""

from __future__ import annotations

import math

import pytest

from nvlm_trt.model.layout import checkpoint_layout
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.planner.calibration_time import calibration_seconds, measured_flop_rate


def test_text_multiplies_every_weight_of_the_decoders_layers_once() -> None:
    config = PRESETS["nvlm-d-72b"]
    weights = sum(
        math.prod(shape)
        for name, shape in checkpoint_layout(config).items()
        if name.startswith("language_model.model.layers.") and len(shape) > 1
    )
    seconds = calibration_seconds(config, 128, 1000, 0, 1e12)
    # attention and one row of logits add some to two operations per weight and token
    assert 1 < seconds / (128 * 1000 * 2 * weights / 1e12) < 1.03


@pytest.mark.parametrize("name", ["nvlm-d-72b", "nvlm-x-72b", "nvlm-h-72b"])
def test_tiles_add_their_encoding_and_their_tokens(name: str) -> None:
    config = PRESETS[name]
    text = calibration_seconds(config, 1, 100, 0, 1e12)
    image = calibration_seconds(config, 1, 100, 7, 1e12, tag_length=1)
    encoder = sum(
        math.prod(shape)
        for tensor, shape in checkpoint_layout(config).items()
        if ".encoder.layers." in tensor and len(shape) > 1
    )
    assert image - text > 7 * 1025 * 2 * encoder / 1e12
    assert calibration_seconds(config, 3, 100, 7, 2e12, tag_length=1) == pytest.approx(3 * image / 2)


def test_the_rate_of_this_machine_is_that_of_some_machine() -> None:
    assert 1e8 < measured_flop_rate() < 1e15
