"""Tests the decoder against transformers' Qwen2 and Llama with the same weights: prefill and cached decoding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers_weights import assert_same, llm_arguments, randomize

from nvlm_trt.model.config import LlmConfig, LlmFamily
from nvlm_trt.model.layout import cross_layout, llm_layout
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.reference.decoder import Decoder


def llm_config(family: LlmFamily, tied: bool) -> LlmConfig:
    return LlmConfig(
        family=family,
        hidden_size=48,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        intermediate_size=96,
        vocab_size=64,
        rope_theta=5000.0,
        norm_eps=1e-5,
        tie_word_embeddings=tied,
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
@torch.no_grad()
def test_prefill_and_cached_decoding_equal_transformers(family: LlmFamily, tied: bool) -> None:
    llm = llm_config(family, tied)
    theirs = (
        Qwen2ForCausalLM(Qwen2Config(**llm_arguments(llm)))
        if family == "qwen2"
        else LlamaForCausalLM(LlamaConfig(**llm_arguments(llm)))
    ).eval()
    randomize(theirs)
    ours = Decoder(replace(PRESETS["nvlm-d-tiny"], llm=llm)).eval()
    weights = theirs.state_dict()
    if tied:
        del weights["lm_head.weight"]
    ours.load_state_dict(weights, strict=True)

    input_ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    their_cache = our_cache = None
    for start, end in [(0, 11), (11, 17), (17, 18), (18, 19), (19, 20)]:
        expected = theirs(input_ids[:, start:end], past_key_values=their_cache, use_cache=True)
        their_cache = expected.past_key_values
        logits, our_cache = ours(ours.embed(input_ids[:, start:end]), cache=our_cache)
        assert_same(logits, expected.logits)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_the_checkpoints(name: str) -> None:
    with torch.device("meta"):
        module = Decoder(PRESETS[name])
    shapes = {f"language_model.{key}": tuple(value.shape) for key, value in module.state_dict().items()}
    assert shapes == llm_layout(PRESETS[name]) | cross_layout(PRESETS[name])
