"""Compares cross_kv with the PyTorch reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stages import ReferenceWeights, assert_close, random_reference, session, tiny_config

from nvlm_trt.builders.graphs.cross_kv import cross_kv_graph
from nvlm_trt.model.config import NvlmConfig

CONFIGS = {
    "X": tiny_config("X"),
    "H": tiny_config("H"),
    "X qk norm": tiny_config("X", cross_attention={"qk_norm": True}),
    "H of one tile": tiny_config("H", max_tiles=1),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equals_reference(config: NvlmConfig) -> None:
    model = random_reference(config)
    rng = np.random.default_rng(0)
    tag_ids, tags = None, None
    if config.architecture == "H":
        tag_ids = torch.from_numpy(rng.integers(0, 256, (config.max_tiles, 5)))
        tags = model.language_model.embed(tag_ids).numpy()
    weights = ReferenceWeights(model)
    graph = session(cross_kv_graph(config, weights, tags))
    left = [name for name in weights.remaining if "cross_layers" in name and ("k_" in name or "v_proj" in name)]
    assert left == []
    for tiles in {1, config.max_tiles}:
        image_tokens = rng.standard_normal((tiles, config.tokens_per_tile, config.llm.hidden_size), dtype=np.float32)
        expected = model.cross_kv(torch.from_numpy(image_tokens), None if tag_ids is None else tag_ids[:tiles])
        outputs = graph.run(None, {"image_tokens": image_tokens})
        names = [output.name for output in graph.get_outputs()]
        assert names == [f"cross_{kind}.{j}" for j in range(len(config.cross_layers)) for kind in ("key", "value")]
        assert_close(np.stack(outputs), torch.stack([tensor for pair in expected for tensor in pair]))
