"""One table says which part of a model a tensor belongs to."""

from __future__ import annotations

import pytest

from nvlm_trt.model.components import OTHER, PARTS, part_of
from nvlm_trt.model.layout import EMBEDDING, LM_HEAD, checkpoint_layout
from nvlm_trt.model.precision import COMPONENTS, component_of
from nvlm_trt.model.presets import PRESETS


@pytest.mark.parametrize("name", ["nvlm-d-72b", "nvlm-x-tiny", "nvlm-h-small"])
def test_every_tensor_of_a_model_has_a_part(name: str) -> None:
    config = PRESETS[name]
    parts = set(map(part_of, checkpoint_layout(config)))
    assert parts == set(PARTS) - (set() if config.cross_layers else {"cross_attention"}) - (
        {"lm_head"} if config.llm.tie_word_embeddings else set()
    )


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        (EMBEDDING, "embedding"),
        (LM_HEAD, "lm_head"),
        ("language_model.lm_head", "lm_head"),
        ("language_model.model.norm.weight", "decoder"),
        ("language_model.model.layers.79.mlp.up_proj", "decoder"),
        ("language_model.cross_layers.0.attn_gate", "cross_attention"),
        ("mlp1.3.weight", "projector"),
        ("mlp10.weight", OTHER),
        ("language_model.lm_header.weight", OTHER),
        ("optimizer.step", OTHER),
        ("", OTHER),
    ],
)
def test_names(tensor: str, part: str) -> None:
    assert part_of(tensor) == part


def test_components_of_precisions_are_parts() -> None:
    assert set(COMPONENTS) == set(PARTS) - {"embedding"}
    assert component_of(EMBEDDING) == "lm_head"  # tied
    with pytest.raises(AssertionError, match="optimizer"):
        component_of("optimizer.step")
