"""Tests the vision encoder and pixel shuffle against transformers' InternVL with the same weights."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from transformers import InternVLVisionModel
from transformers.models.internvl.modeling_internvl import InternVLModel
from transformers_weights import assert_same, internvl_vision_config, internvl_vision_weights, randomize

from nvlm_trt.model.config import VisionConfig
from nvlm_trt.model.layout import projector_layout, vision_layout
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.reference.vision import VisionEncoder, pixel_shuffle, projector


@pytest.mark.parametrize(
    ("norm_type", "qk_norm", "qkv_bias"),
    [("rms_norm", True, False), ("layer_norm", False, True), ("layer_norm", True, True), ("rms_norm", False, False)],
)
@torch.no_grad()
def test_encoder_equals_transformers(
    norm_type: Literal["rms_norm", "layer_norm"], qk_norm: bool, qkv_bias: bool
) -> None:
    config = VisionConfig(
        hidden_size=48,
        num_layers=3,
        num_heads=3,
        intermediate_size=96,
        image_size=56,
        patch_size=7,
        norm_type=norm_type,
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
    )
    theirs = InternVLVisionModel(internvl_vision_config(config)).eval()
    randomize(theirs)
    ours = VisionEncoder(config).eval()
    ours.load_state_dict(internvl_vision_weights(theirs.state_dict()), strict=True)
    pixel_values = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    assert_same(ours(pixel_values), theirs(pixel_values).last_hidden_state[:, 1:])


def test_pixel_shuffle_v2_is_the_order_of_transformers() -> None:
    patches = torch.randn(2, 64, 12)
    expected = InternVLModel.pixel_shuffle(None, patches.view(2, 8, 8, 12), 0.5)
    assert torch.equal(pixel_shuffle(patches, "v2"), expected.flatten(1, 2))


def test_pixel_shuffle_v1_leaves_rows_and_columns_swapped() -> None:
    patches = torch.randn(2, 64, 12)
    rows_first = InternVLModel.pixel_shuffle(None, patches.view(2, 8, 8, 12), 0.5)  # [n, 4, 4, 48]
    assert torch.equal(pixel_shuffle(patches, "v1"), rows_first.transpose(1, 2).flatten(1, 2))


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_the_checkpoints(name: str) -> None:
    config = PRESETS[name]
    with torch.device("meta"):
        modules = {"vision_model.": VisionEncoder(config.vision), "mlp1.": projector(config)}
    shapes = {
        prefix + key: tuple(value.shape)
        for prefix, module in modules.items()
        for key, value in module.state_dict().items()
    }
    assert shapes == vision_layout(config) | projector_layout(config)
