"""Tests the gated cross-attention block against transformers' Mllama and Idefics, and ranges against a boolean mask."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import IdeficsConfig, MllamaTextConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer
from transformers_weights import assert_same, llm_arguments, randomize

from nvlm_trt.model.config import CrossAttentionConfig, LlmConfig
from nvlm_trt.reference.cross_attention import GatedCrossAttentionBlock

HIDDEN, TOKENS, IMAGE = 48, 7, 20
LLM = LlmConfig(family="llama", hidden_size=HIDDEN, num_layers=2, num_heads=6, num_kv_heads=2,
                intermediate_size=96, vocab_size=64, rope_theta=1e4, norm_eps=1e-5)  # fmt: skip
# before the image, within it, one token, all of it
RANGES = torch.tensor([[[0, 20], [0, 1], [5, 9], [19, 20], [3, 17], [0, 8], [10, 20]]], dtype=torch.int32)


def boolean_mask(ranges: Tensor, length: int) -> Tensor:
    """Makes a mask [B, S, C] of ranges [B, S, 2], pair by pair."""
    rows = [[[start <= c < end for c in range(length)] for start, end in row] for row in ranges.tolist()]
    return torch.tensor(rows)


def additive_mask(ranges: Tensor) -> Tensor:
    """Makes transformers' mask [B, 1, S, C]: 0 where a token may read, the most negative float elsewhere."""
    return torch.where(boolean_mask(ranges, IMAGE), 0.0, torch.finfo(torch.float32).min)[:, None]


def random_inputs(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, TOKENS, HIDDEN, generator=generator), torch.randn(IMAGE, HIDDEN, generator=generator)


def rename(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in weights.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


@torch.no_grad()
def test_block_equals_mllama() -> None:
    """Grouped-query attention with qk-norm, gated attention and gated FFN; every token sees some of the image."""
    theirs = MllamaCrossAttentionDecoderLayer(MllamaTextConfig(**llm_arguments(LLM)), layer_idx=0).eval()
    theirs.cross_attn.config._attn_implementation = "eager"
    randomize(theirs)
    ours = GatedCrossAttentionBlock(LLM, CrossAttentionConfig(interval=1, qk_norm=True)).eval()
    names = {"cross_attn_attn_gate": "attn_gate", "cross_attn_mlp_gate": "mlp_gate", "cross_attn.": "attn."}
    ours.load_state_dict(rename(theirs.state_dict(), names), strict=True)
    x, image = random_inputs()
    expected = theirs(
        x,
        cross_attention_states=image[None],
        cross_attention_mask=additive_mask(RANGES),
        attention_mask=None,
        full_text_row_masked_out_mask=None,
    )
    assert_same(ours(x, *ours.attn.key_value(image), RANGES), expected)


@torch.no_grad()
def test_block_without_ffn_equals_idefics_with_tokens_before_the_image() -> None:
    """Idefics zeroes the attention of tokens that see no image; with its FFN's gate at 0 it passes them unchanged."""
    llm = LlmConfig(family="llama", hidden_size=HIDDEN, num_layers=2, num_heads=6, num_kv_heads=6,
                    intermediate_size=96, vocab_size=64, rope_theta=1e4, norm_eps=1e-5)  # fmt: skip
    config = IdeficsConfig(
        hidden_size=HIDDEN, num_attention_heads=6, intermediate_size=96, rms_norm_eps=1e-5, qk_layer_norms=False,
        vision_config={"embed_dim": HIDDEN},
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = IdeficsGatedCrossAttentionLayer(config, layer_idx=0).eval()
    randomize(theirs)
    theirs.alpha_dense.zero_()
    ours = GatedCrossAttentionBlock(llm, CrossAttentionConfig(interval=1, ffn=False)).eval()
    weights = rename(theirs.state_dict(), {"alpha_cross_attn": "attn_gate", "cross_attn.": "attn."})
    unused = ("alpha_dense", "mlp.", "post_attention_layernorm.", "rotary_emb")
    weights = {name: tensor for name, tensor in weights.items() if not any(part in name for part in unused)}
    ours.load_state_dict(weights, strict=True)
    x, image = random_inputs()
    ranges = RANGES.clone()
    ranges[0, :3] = 0
    expected = theirs(
        x,
        image_hidden_states=image[None],
        image_attention_mask=additive_mask(ranges),
        cross_attention_gate=boolean_mask(ranges, IMAGE).any(-1).float(),
    )
    actual = ours(x, *ours.attn.key_value(image), ranges)
    assert_same(actual, expected)
    assert torch.equal(actual[:, :3], x[:, :3])


def softmax_by_hand(block: GatedCrossAttentionBlock, x: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Computes the attention of a block, one row and head at a time, over the tokens that the boolean mask keeps."""
    attn = block.attn
    queries = attn.q_proj(block.input_layernorm(x)[0]).unflatten(-1, (-1, attn.head_dim))  # [S, heads, head_dim]
    group = queries.shape[1] // len(key)
    rows = []
    for row, keep in zip(queries, mask[0], strict=True):
        heads = []
        for head, query in enumerate(row):
            kept_key, kept_value = key[head // group][keep], value[head // group][keep]
            weights = torch.softmax(kept_key @ query / math.sqrt(attn.head_dim), dim=0)
            heads.append(weights @ kept_value)
        rows.append(torch.cat(heads))
    return attn.o_proj(torch.stack(rows))[None]


ranges_strategy = st.lists(
    st.tuples(st.integers(0, IMAGE), st.integers(0, IMAGE)), min_size=TOKENS, max_size=TOKENS
).map(lambda pairs: torch.tensor([pairs], dtype=torch.int32))


@pytest.mark.parametrize("ffn", [True, False])
@settings(deadline=None, max_examples=30)
@given(ranges=ranges_strategy, seed=st.integers(0, 100))
@torch.no_grad()
def test_ranges_equal_a_boolean_mask(ffn: bool, ranges: Tensor, seed: int) -> None:
    block = GatedCrossAttentionBlock(LLM, CrossAttentionConfig(interval=1, ffn=ffn)).eval()
    randomize(block, seed)
    x, image = random_inputs(seed)
    key, value = block.attn.key_value(image)
    mask = boolean_mask(ranges, IMAGE)
    actual = block(x, key, value, ranges)

    attention = softmax_by_hand(block, x, key, value, mask)
    expected = x + torch.tanh(block.attn_gate) * attention
    if ffn:
        expected = expected + torch.tanh(block.mlp_gate) * block.mlp(block.post_attention_layernorm(expected))
    sees_image = mask.any(-1)
    assert torch.isfinite(actual).all()
    torch.testing.assert_close(actual[sees_image], expected[sees_image], rtol=0, atol=1e-4)
    assert torch.equal(actual[~sees_image], x[~sees_image])
    alone = block.attn(block.input_layernorm(x), key, value, ranges)
    assert not alone[~sees_image].any()


@torch.no_grad()
def test_tokens_outside_the_range_have_no_influence() -> None:
    block = GatedCrossAttentionBlock(LLM, CrossAttentionConfig(interval=1)).eval()
    randomize(block)
    x, image = random_inputs()
    ranges = torch.tensor([[[4, 9]] * TOKENS], dtype=torch.int32)
    before = block(x, *block.attn.key_value(image), ranges)
    poisoned = image.clone()
    poisoned[:4] = poisoned[9:] = 1e4
    assert torch.equal(block(x, *block.attn.key_value(poisoned), ranges), before)
    poisoned[4:9] += 1
    assert not torch.equal(block(x, *block.attn.key_value(poisoned), ranges), before)


def test_a_closed_gate_is_the_identity() -> None:
    block = GatedCrossAttentionBlock(LLM, CrossAttentionConfig(interval=1))
    x, image = random_inputs()
    assert isinstance(block.attn_gate, nn.Parameter)
    assert torch.equal(block(x, *block.attn.key_value(image), RANGES), x)
