"""Compares the decoder, in all forms of its attention, with the PyTorch reference."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from stages import IMAGE_TOKEN, ReferenceWeights, assert_close, random_reference, session, tiny_config

from nvlm_trt.builders.graphs.cross_kv import cross_kv_graph
from nvlm_trt.builders.graphs.decoder import decoder_graph
from nvlm_trt.builders.graphs.self_attention import (
    GroupQueryAttention,
    SelfAttention,
    StandardAttention,
    TensorRtAttention,
)
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.config import Architecture, NvlmConfig
from nvlm_trt.reference.model import ReferenceModel

LIMITS = EngineLimits(max_slots=4, max_seq_len=48, max_image_tokens=40)
CROSS_TOKENS = 32
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


class DecoderRunner:
    """A decoder session with the caches of `slots` sequences, and the cross-attention inputs that all slots share."""

    def __init__(self, model: ReferenceModel, attention: type[SelfAttention], slots: int = 1) -> None:
        self.model, self.config = model, model.config
        unread = int(not attention.value_dependent_shapes)  # such a form has a row even without image embeddings
        self.no_image_tokens = np.full((unread, self.config.llm.hidden_size), np.nan, np.float32)
        weights = ReferenceWeights(model)
        self.session: onnxruntime.InferenceSession = session(
            decoder_graph(self.config, weights, LIMITS, attention=attention)
        )
        self.untaken = weights.remaining
        llm = self.config.llm
        shape = (slots, llm.num_kv_heads, LIMITS.max_seq_len, llm.head_dim)
        self.cache = {
            f"{kind}.{i}": np.zeros(shape, np.float32) for i in range(llm.num_layers) for kind in ("key", "value")
        }
        self.cross: dict[str, np.ndarray] = {}
        self.reference_kv = None
        if self.config.cross_layers:
            image = torch.randn(CROSS_TOKENS, llm.hidden_size, generator=torch.Generator().manual_seed(5))
            self.reference_kv = model.language_model.cross_kv(image)
            for j, (key, value) in enumerate(self.reference_kv):
                for kind, tensor in (("key", key), ("value", value)):
                    padded = np.full((slots, llm.num_kv_heads, LIMITS.max_image_tokens, llm.head_dim), 7, np.float32)
                    padded[:, :, :CROSS_TOKENS] = tensor.numpy()
                    self.cross[f"cross_{kind}.{j}"] = padded

    def step(
        self,
        input_ids: np.ndarray,  # [B, S]
        cached: list[int],
        ranges: np.ndarray,  # [B, S, 2]
        image_tokens: np.ndarray | None = None,
        logit_index: list[int] | None = None,
    ) -> np.ndarray:
        batch, tokens = input_ids.shape
        feeds = {
            "input_ids": input_ids,
            "write_indices": np.array(cached),
            "logit_index": np.array(logit_index or [tokens - 1] * batch),
            "image_tokens": self.no_image_tokens if image_tokens is None else image_tokens,
            **{f"past_{name}": values for name, values in self.cache.items()},
        }
        if self.config.cross_layers:
            feeds |= {"cross_ranges": ranges, **self.cross}
        names = ["logits", *(f"present_{name}" for name in self.cache)]
        logits, *present = self.session.run(names, feeds)
        self.cache = dict(zip(self.cache, present, strict=True))
        return logits

    def reference_logits(
        self, input_ids: np.ndarray, ranges: np.ndarray, image_tokens: np.ndarray | None = None
    ) -> torch.Tensor:
        """Compute the reference's logits [B, S, vocab] of whole sequences."""
        logits, _ = self.model(
            torch.from_numpy(input_ids),
            None if image_tokens is None else torch.from_numpy(image_tokens),
            self.reference_kv,
            torch.from_numpy(ranges),
        )
        return logits


def random_prompt(batch: int, tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Make text ids [B, S] and ranges [B, S, 2]: text without image, tags that read their tile, text that reads all."""
    rng = np.random.default_rng(seed)
    ranges = np.zeros((batch, tokens, 2), np.int32)
    third = tokens // 3
    ranges[:, third : 2 * third] = [16, 32]
    ranges[:, 2 * third :] = [0, CROSS_TOKENS]
    return rng.integers(0, 256, (batch, tokens)), ranges


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
