"""Compares the decoder, in all forms of its attention, with the PyTorch reference."""

from __future__ import annotations

import numpy as np
import pytest
from decoder_runner import DecoderRunner, random_prompt
from stages import IMAGE_TOKEN, ReferenceWeights, assert_close, random_reference, tiny_config

from nvlm_trt.builders.graphs.cross_kv import cross_kv_graph
from nvlm_trt.builders.graphs.self_attention import (
    GroupQueryAttention,
    SelfAttention,
    StandardAttention,
    TensorRtAttention,
)
from nvlm_trt.model.config import Architecture, NvlmConfig

FORMS = [StandardAttention, GroupQueryAttention, TensorRtAttention]
CONFIGS = {
    "D": tiny_config("D"),
    "D llama": tiny_config("D", llm={"family": "llama", "norm_eps": 1e-5}),
    "D tied, own head_dim": tiny_config("D", llm={"tie_word_embeddings": True, "head_dim": 16}),
    "X": tiny_config("X"),
    "X qk norm": tiny_config("X", cross_attention={"qk_norm": True}),
    "X without FFN": tiny_config("X", cross_attention={"ffn": False}),
    "X interval 4": tiny_config("X", cross_attention={"interval": 4}),
    "H llama": tiny_config("H", llm={"family": "llama"}),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("attention", FORMS)
def test_prefill_and_decode_equal_reference(config: NvlmConfig, attention: type[SelfAttention]) -> None:
    runner = DecoderRunner(random_reference(config), attention)
    input_ids, ranges = random_prompt(1, 21)
    expected = runner.reference_logits(input_ids, ranges)
    assert_close(runner.step(input_ids[:, :18], [0], ranges[:, :18]), expected[:, 17])
    for position in range(18, 21):
        here = slice(position, position + 1)
        assert_close(runner.step(input_ids[:, here], [position], ranges[:, here]), expected[:, position])


@pytest.mark.parametrize("attention", FORMS)
def test_chunked_prefill_equals_whole_prefill(attention: type[SelfAttention]) -> None:
    model = random_reference(tiny_config("H"))
    whole, chunked = DecoderRunner(model, attention), DecoderRunner(model, attention)
    input_ids, ranges = random_prompt(1, 30)
    expected = whole.step(input_ids, [0], ranges)
    for start, stop in ((0, 7), (7, 8), (8, 24), (24, 30)):
        logits = chunked.step(input_ids[:, start:stop], [start], ranges[:, start:stop])
    assert_close(logits, expected)
    for name, cache in whole.cache.items():
        assert_close(chunked.cache[name][:, :, :30], cache[:, :, :30])


@pytest.mark.parametrize("attention", FORMS[1:])
def test_forms_of_attention_agree(attention: type[SelfAttention]) -> None:
    model = random_reference(tiny_config("X"))
    input_ids, ranges = random_prompt(1, 24)
    standard, other = DecoderRunner(model, StandardAttention), DecoderRunner(model, attention)
    assert_close(standard.step(input_ids, [0], ranges), other.step(input_ids, [0], ranges), 5e-6)
    for name, cache in standard.cache.items():
        assert_close(other.cache[name][:, :, :24], cache[:, :, :24], 5e-6)


@pytest.mark.parametrize("attention", FORMS)
def test_decodes_sequences_of_different_lengths_as_one_batch(attention: type[SelfAttention]) -> None:
    model = random_reference(tiny_config("X"))
    lengths = [5, 20, 1]
    input_ids, ranges = random_prompt(3, 21)
    ranges[2] = 0  # a text-only neighbour
    runner = DecoderRunner(model, attention, slots=3)
    for slot, length in enumerate(lengths):
        alone = DecoderRunner(model, attention)
        alone.step(input_ids[slot : slot + 1, :length], [0], ranges[slot : slot + 1, :length])
        for name in runner.cache:
            runner.cache[name][slot] = alone.cache[name][0]
    rows = np.arange(3)
    logits = runner.step(input_ids[rows, lengths][:, None], lengths, ranges[rows, lengths][:, None])
    expected = runner.reference_logits(input_ids, ranges)
    assert_close(logits, expected[rows, lengths])


@pytest.mark.parametrize("attention", FORMS)
def test_splices_image_tokens_in_order(attention: type[SelfAttention]) -> None:
    runner = DecoderRunner(random_reference(tiny_config("D")), attention, slots=2)
    input_ids, ranges = random_prompt(2, 12)
    input_ids[0, 3:7] = input_ids[1, 0] = input_ids[1, 9] = IMAGE_TOKEN
    image_tokens = np.random.default_rng(1).standard_normal((6, 192), dtype=np.float32)
    expected = runner.reference_logits(input_ids, ranges, image_tokens)
    assert_close(runner.step(input_ids, [0, 0], ranges, image_tokens), expected[:, -1])


@pytest.mark.parametrize("attention", FORMS)
def test_logit_index_selects_the_row(attention: type[SelfAttention]) -> None:
    runner = DecoderRunner(random_reference(tiny_config("D")), attention, slots=2)
    input_ids, ranges = random_prompt(2, 9)
    expected = runner.reference_logits(input_ids, ranges)
    assert_close(runner.step(input_ids, [0, 0], ranges, logit_index=[2, 7]), expected[[0, 1], [2, 7]])


def test_logit_index_may_select_several_rows_of_each_sequence() -> None:
    runner = DecoderRunner(random_reference(tiny_config("D")), GroupQueryAttention, slots=2)
    input_ids, ranges = random_prompt(2, 9)
    expected = runner.reference_logits(input_ids, ranges)
    logits = runner.step(input_ids, [0, 0], ranges, logit_index=[2, 0, 8, 7, 3, 3])
    assert_close(logits, expected[[0, 0, 0, 1, 1, 1], [2, 0, 8, 7, 3, 3]])


def test_what_is_skipped_changes_no_bit() -> None:
    model = random_reference(tiny_config("X"))
    runner, whole = (DecoderRunner(model, GroupQueryAttention, slots=2, skip_unused=skip) for skip in (True, False))
    input_ids, ranges = random_prompt(2, 9)
    for wanted in ([8, 8], [2, 0, 8, 7, 3, 3]):
        logits = [each.step(input_ids, [0, 0], ranges, logit_index=wanted) for each in (runner, whole)]
        assert np.isfinite(logits[0]).all()
        np.testing.assert_array_equal(logits[0], logits[1])
        for name, cache in whole.cache.items():
            np.testing.assert_array_equal(runner.cache[name], cache)


def test_logit_index_may_select_no_row() -> None:
    config = tiny_config("X")
    runner, other = (DecoderRunner(random_reference(config), GroupQueryAttention, slots=2) for _ in range(2))
    input_ids, ranges = random_prompt(2, 9)
    assert runner.step(input_ids, [0, 0], ranges, logit_index=[]).shape == (0, config.llm.vocab_size)
    other.step(input_ids, [0, 0], ranges)
    for name, cache in other.cache.items():
        np.testing.assert_array_equal(runner.cache[name], cache)


@pytest.mark.parametrize("attention", FORMS)
@pytest.mark.parametrize("neighbour_has_image", [False, True])
def test_text_only_is_bit_identical_to_the_llm_alone(attention: type[SelfAttention], neighbour_has_image: bool) -> None:
    with_blocks = random_reference(tiny_config("X"))
    alone = random_reference(tiny_config("D"))
    alone.load_state_dict(with_blocks.state_dict() | alone.mlp1.state_dict(prefix="mlp1."), strict=False)
    input_ids, ranges = random_prompt(2, 10)
    ranges[0 if neighbour_has_image else slice(None)] = 0
    runners = [DecoderRunner(model, attention, slots=2) for model in (with_blocks, alone)]
    text_only = [0] if neighbour_has_image else [0, 1]
    for step in (slice(0, 9), slice(9, 10)):
        logits = [runner.step(input_ids[:, step], [step.start] * 2, ranges[:, step]) for runner in runners]
        assert np.isfinite(logits[0]).all()
        assert np.array_equal(logits[0][text_only], logits[1][text_only])
    if neighbour_has_image:
        assert not np.array_equal(logits[0][1], logits[1][1])


def test_every_weight_is_in_exactly_one_graph() -> None:
    architectures: tuple[Architecture, ...] = ("D", "X", "H")
    for architecture in architectures:
        runner = DecoderRunner(random_reference(tiny_config(architecture)), GroupQueryAttention)
        left = {name for name in runner.untaken if name.startswith("language_model")}
        if runner.config.cross_layers:
            weights = ReferenceWeights(runner.model)
            tags = np.zeros((6, 1, 192), np.float32) if architecture == "H" else None
            cross_kv_graph(runner.config, weights, tags)
            left &= weights.remaining
        assert left == set()
