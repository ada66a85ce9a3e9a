"""Compares vision_encoder with the PyTorch reference, for every option of the config that the graph depends on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stages import ReferenceWeights, assert_close, random_reference, session, tiny_config

from nvlm_trt.builders.graphs.vision_attention import (
    VisionAttention,
    multi_head_vision_attention,
    standard_vision_attention,
    tensorrt_vision_attention,
)
from nvlm_trt.builders.graphs.vision_encoder import vision_encoder_graph
from nvlm_trt.model.config import NvlmConfig

CONFIGS = {
    "D": tiny_config("D"),
    "X": tiny_config("X"),
    "H": tiny_config("H"),
    "pixel shuffle v1": tiny_config("D", pixel_shuffle="v1"),
    "layer norm": tiny_config("D", vision={"norm_type": "layer_norm"}),
    "no qk norm": tiny_config("D", vision={"qk_norm": False}),
    "qkv bias": tiny_config("D", vision={"qkv_bias": True}),
    "projector width": tiny_config("D", projector_hidden_size=96),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    "attention", [standard_vision_attention, multi_head_vision_attention, tensorrt_vision_attention]
)
def test_equals_reference(config: NvlmConfig, attention: VisionAttention) -> None:
    model = random_reference(config)
    weights = ReferenceWeights(model)
    encoder = session(vision_encoder_graph(config, weights, attention=attention))
    assert not [name for name in weights.remaining if name.startswith(("vision_model", "mlp1"))]
    edge = config.vision.image_size
    for tiles in (1, 3):
        pixels = np.random.default_rng(tiles).standard_normal((tiles, 3, edge, edge), dtype=np.float32)
        (image_tokens,) = encoder.run(["image_tokens"], {"pixel_values": pixels})
        assert_close(image_tokens, model.encode(torch.from_numpy(pixels)))
