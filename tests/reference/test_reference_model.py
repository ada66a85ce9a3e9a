"""Tests NVLM-D as a whole against transformers' InternVL, and text, tags, ranges and the cache of NVLM-X and -H."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config
from transformers_weights import (
    assert_same,
    internvl_vision_config,
    internvl_vision_weights,
    llm_arguments,
    randomize,
)

from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.errors import CheckpointError, RequestError
from nvlm_trt.model.config import LlmConfig, NvlmConfig, VisionConfig
from nvlm_trt.model.layout import checkpoint_layout
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.prompt.encoder import EncodedPrompt
from nvlm_trt.reference.decoder import Cache, KeyValue
from nvlm_trt.reference.model import ReferenceModel

IMAGE_TOKEN = 60
TINY_NAMES = ["nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny"]

Checkpoints = Callable[[str], Path]
Pair = tuple[InternVLForConditionalGeneration, ReferenceModel]


@pytest.fixture(scope="session")
def reference(checkpoint: Checkpoints) -> Callable[[str], ReferenceModel]:
    models: dict[str, ReferenceModel] = {}

    def load(name: str) -> ReferenceModel:
        if name not in models:
            models[name] = ReferenceModel.from_checkpoint(checkpoint(name))
        return models[name]

    return load


def random_ids(length: int, seed: int = 0) -> Tensor:
    """Makes text tokens [1, S]."""
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(seed))


def random_tiles(model: ReferenceModel, count: int, seed: int = 0) -> Tensor:
    edge = model.config.vision.image_size
    return torch.randn(count, 3, edge, edge, generator=torch.Generator().manual_seed(seed))


def random_cross_kv(model: ReferenceModel, tiles: int, seed: int = 0) -> list[KeyValue]:
    tag_ids = torch.arange(5 * tiles).view(tiles, 5) if model.config.architecture == "H" else None
    return model.cross_kv(model.encode(random_tiles(model, tiles, seed)), tag_ids)


INTERNVL = NvlmConfig(
    name="internvl",
    architecture="D",
    vision=VisionConfig(
        hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, image_size=56, patch_size=7
    ),
    llm=LlmConfig(family="qwen2", hidden_size=48, num_layers=3, num_heads=6, num_kv_heads=2,
                  intermediate_size=96, vocab_size=64, rope_theta=1e4),
    image_token_id=IMAGE_TOKEN,
    projector_hidden_size=48,  # transformers' projector has no width of its own
)  # fmt: skip


@pytest.fixture(scope="module")
def internvl_pair() -> Pair:
    theirs = InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=internvl_vision_config(INTERNVL.vision),
            text_config=Qwen2Config(**llm_arguments(INTERNVL.llm)),
            image_token_id=IMAGE_TOKEN,
            image_seq_length=INTERNVL.tokens_per_tile,
            tie_word_embeddings=False,
        )
    ).eval()
    randomize(theirs)
    projector = theirs.model.multi_modal_projector
    with torch.no_grad():
        projector.linear_1.bias.zero_()  # NVLM's projector has none
        projector.linear_2.bias.zero_()
    vision = internvl_vision_weights(theirs.model.vision_tower.state_dict())
    weights = {f"vision_model.{name}": tensor for name, tensor in vision.items()}
    weights |= {
        "mlp1.0.weight": projector.layer_norm.weight,
        "mlp1.0.bias": projector.layer_norm.bias,
        "mlp1.1.weight": projector.linear_1.weight,
        "mlp1.3.weight": projector.linear_2.weight,
        "language_model.lm_head.weight": theirs.lm_head.weight,
    }
    llm = theirs.model.language_model.state_dict()
    weights |= {f"language_model.model.{name}": tensor for name, tensor in llm.items()}
    ours = ReferenceModel(INTERNVL).eval()
    ours.load_state_dict(weights, strict=True)
    return theirs, ours


@pytest.fixture(scope="module")
def internvl_ids() -> Tensor:
    """Makes a sequence of two tiles, each after a few tokens of text."""
    text = torch.randint(0, IMAGE_TOKEN, (12,), generator=torch.Generator().manual_seed(3))
    tile = torch.full((INTERNVL.tokens_per_tile,), IMAGE_TOKEN)
    return torch.cat([text[:4], tile, text[4:7], tile, text[7:]])[None]


class TestAgainstTransformers:
    @torch.no_grad()
    def test_image_tokens(self, internvl_pair: Pair) -> None:
        theirs, ours = internvl_pair
        pixel_values = random_tiles(ours, 2)
        expected = theirs.get_image_features(pixel_values, vision_feature_layer=-1).pooler_output
        assert_same(ours.encode(pixel_values), expected)

    @torch.no_grad()
    def test_logits_with_images_then_cached_decoding(self, internvl_pair: Pair, internvl_ids: Tensor) -> None:
        theirs, ours = internvl_pair
        pixel_values = random_tiles(ours, 2)
        expected = theirs(input_ids=internvl_ids, pixel_values=pixel_values, use_cache=True)
        logits, cache = ours(internvl_ids, ours.encode(pixel_values).flatten(0, 1))
        assert_same(logits, expected.logits)
        step = torch.tensor([[7]])
        expected = theirs(input_ids=step, past_key_values=expected.past_key_values, use_cache=True)
        assert_same(ours(step, cache=cache)[0], expected.logits)

    @torch.no_grad()
    def test_greedy_tokens(self, internvl_pair: Pair, internvl_ids: Tensor) -> None:
        theirs, ours = internvl_pair
        pixel_values = random_tiles(ours, 2)
        expected = theirs.generate(
            input_ids=internvl_ids,
            pixel_values=pixel_values,
            attention_mask=torch.ones_like(internvl_ids),
            do_sample=False,
            max_new_tokens=24,
            bad_words_ids=[[IMAGE_TOKEN]],
        )[0, internvl_ids.shape[1] :]
        no_ranges = np.zeros((internvl_ids.shape[1], 2), np.int32)
        prompt = EncodedPrompt(internvl_ids[0].numpy(), no_ranges, 2 * INTERNVL.tokens_per_tile, 0)
        tokens = ours.generate(prompt, ours.encode(pixel_values).flatten(0, 1), None, 24)
        assert tokens == expected.tolist()
        assert len(set(tokens)) > 5


class TestCheckpoint:
    @pytest.mark.parametrize("name", TINY_NAMES)
    def test_every_tensor_is_loaded(
        self, checkpoint: Checkpoints, reference: Callable[[str], ReferenceModel], name: str
    ) -> None:
        model = reference(name)
        state = model.state_dict()
        assert {key: tuple(value.shape) for key, value in state.items()} == checkpoint_layout(model.config)
        with Checkpoint.open(checkpoint(name)) as opened:
            assert all(np.array_equal(opened.take(key).load(), value.numpy()) for key, value in state.items())

    def test_bfloat16(self, checkpoint: Checkpoints, reference: Callable[[str], ReferenceModel]) -> None:
        model = ReferenceModel.from_checkpoint(checkpoint("nvlm-d-tiny"), dtype=torch.bfloat16)
        logits, _ = model(random_ids(8))
        assert logits.dtype == torch.bfloat16
        expected, _ = reference("nvlm-d-tiny")(random_ids(8))
        assert torch.isfinite(logits).all()
        assert torch.nn.functional.cosine_similarity(logits.float(), expected, dim=-1).min() > 0.99

    def test_a_checkpoint_that_lacks_a_tensor(self, checkpoint: Checkpoints, tmp_path: Path) -> None:
        source = checkpoint("nvlm-d-tiny")
        for path in source.iterdir():
            (tmp_path / path.name).symlink_to(path)
        raw = (source / "config.json").read_text()
        (tmp_path / "config.json").unlink()
        (tmp_path / "config.json").write_text(raw.replace('"num_hidden_layers": 6', '"num_hidden_layers": 7'))
        with pytest.raises(CheckpointError, match=r"layers\.6"):
            ReferenceModel.from_checkpoint(tmp_path)


class TestCrossAttention:
    """Properties of NVLM-X and NVLM-H; both share the vision encoder and the LLM of NVLM-D with the same seed."""

    @pytest.mark.parametrize("name", ["nvlm-x-tiny", "nvlm-h-tiny"])
    def test_text_alone_is_the_llm_alone_bit_for_bit(
        self, reference: Callable[[str], ReferenceModel], name: str
    ) -> None:
        llm, model = reference("nvlm-d-tiny"), reference(name)
        ids = random_ids(24)
        expected, _ = llm(ids)
        without, _ = model(ids)
        nothing = torch.zeros(1, 24, 2, dtype=torch.int32)
        empty_ranges, _ = model(ids, None, random_cross_kv(model, 2), nothing)
        assert torch.isfinite(expected).all()
        assert torch.equal(without, expected)
        assert torch.equal(empty_ranges, expected)

    @pytest.mark.parametrize("name", ["nvlm-x-tiny", "nvlm-h-tiny"])
    def test_text_before_the_image_is_untouched_and_text_after_it_is_not(
        self, reference: Callable[[str], ReferenceModel], name: str
    ) -> None:
        model = reference(name)
        ids = random_ids(24)
        cross_kv = random_cross_kv(model, 2)
        ranges = torch.zeros(1, 24, 2, dtype=torch.int32)
        ranges[:, 10:, 1] = cross_kv[0][0].shape[1]
        plain, _ = model(ids)
        logits, _ = model(ids, None, cross_kv, ranges)
        assert torch.equal(logits[:, :10], plain[:, :10])
        assert (logits[:, 10:] - plain[:, 10:]).abs().max(-1).values.min() > 0.1
        other, _ = model(ids, None, random_cross_kv(model, 2, seed=1), ranges)
        assert (logits[:, 10:] - other[:, 10:]).abs().max(-1).values.min() > 0.01

    def test_block_j_stands_before_layer_j_times_interval(self, reference: Callable[[str], ReferenceModel]) -> None:
        model = reference("nvlm-x-tiny")
        order: list[tuple[str, int]] = []
        hooks = [
            module.register_forward_pre_hook(lambda *_, key=(kind, i): order.append(key))
            for kind, modules in [
                ("layer", model.language_model.model.layers),
                ("cross", model.language_model.cross_layers),
            ]
            for i, module in enumerate(modules)
        ]
        ranges = torch.tensor([[[0, 1]] * 3], dtype=torch.int32)
        model(random_ids(3), None, random_cross_kv(model, 1), ranges)
        for hook in hooks:
            hook.remove()
        layers = [("layer", i) for i in range(6)]
        assert order == [("cross", 0), *layers[:2], ("cross", 1), *layers[2:4], ("cross", 2), *layers[4:]]

    def test_each_block_reads_its_own_keys_and_values(self, reference: Callable[[str], ReferenceModel]) -> None:
        model = reference("nvlm-x-tiny")
        cross_kv = random_cross_kv(model, 1)
        ranges = torch.tensor([[[0, 16]] * 5], dtype=torch.int32)
        expected, _ = model(random_ids(5), None, cross_kv, ranges)
        for j in range(len(cross_kv)):
            emptied = [(key, value if i != j else torch.zeros_like(value)) for i, (key, value) in enumerate(cross_kv)]
            logits, _ = model(random_ids(5), None, emptied, ranges)
            assert (logits - expected).abs().max() > 0.1

    def test_tag_embeddings_stand_before_each_tiles_tokens(self, reference: Callable[[str], ReferenceModel]) -> None:
        model = reference("nvlm-h-tiny")
        tiles = model.encode(random_tiles(model, 2))
        tag_ids = torch.tensor([[60, 61, 62], [60, 61, 63]])
        embeddings = model.state_dict()["language_model.model.embed_tokens.weight"]
        memory = torch.cat([embeddings[tag_ids[0]], tiles[0], embeddings[tag_ids[1]], tiles[1]])
        for j, (key, value) in enumerate(model.cross_kv(tiles, tag_ids)):
            state = model.state_dict()
            for actual, name in [(key, "k_proj"), (value, "v_proj")]:
                expected = memory @ state[f"language_model.cross_layers.{j}.attn.{name}.weight"].T
                torch.testing.assert_close(actual.transpose(0, 1).flatten(1), expected, rtol=1e-5, atol=1e-5)

    def test_tags_belong_to_h_alone(self, reference: Callable[[str], ReferenceModel]) -> None:
        for name, tag_ids in [("nvlm-h-tiny", None), ("nvlm-x-tiny", torch.zeros(1, 5, dtype=torch.long))]:
            model = reference(name)
            with pytest.raises(RequestError, match="tile tags"):
                model.cross_kv(torch.zeros(1, model.config.tokens_per_tile, model.config.llm.hidden_size), tag_ids)

    def test_qk_norm_and_no_ffn_make_a_model_too(self) -> None:
        tiny = PRESETS["nvlm-x-tiny"]
        assert tiny.cross_attention is not None
        config = replace(
            tiny, image_token_id=IMAGE_TOKEN, cross_attention=replace(tiny.cross_attention, ffn=False, qk_norm=True)
        )
        model = ReferenceModel(config)
        assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == checkpoint_layout(config)


class TestDecoding:
    @pytest.mark.parametrize("name", TINY_NAMES)
    def test_cached_decoding_equals_one_forward(self, reference: Callable[[str], ReferenceModel], name: str) -> None:
        """Prefill in two chunks that split the image's tokens, then token by token."""
        model = reference(name)
        image, cross_kv = None, None
        ids = random_ids(40)
        ranges = torch.zeros(1, 40, 2, dtype=torch.int32)
        if name != "nvlm-x-tiny":
            image = model.encode(random_tiles(model, 1))[0]  # [16, hidden]
            ids[:, 5:21] = model.image_token_id
        if name != "nvlm-d-tiny":
            cross_kv = random_cross_kv(model, 2)
            ranges[:, 5:21] = torch.tensor([3, 9])
            ranges[:, 21:, 1] = cross_kv[0][0].shape[1]
        expected, _ = model(ids, image, cross_kv, ranges)
        cache: Cache | None = None
        done = 0
        for end in [12, 30, *range(31, 41)]:
            span = slice(done, end)
            places = int((ids[:, span] == model.image_token_id).sum())
            before = int((ids[:, :done] == model.image_token_id).sum())
            part = image[before : before + places] if image is not None and places else None
            logits, cache = model(ids[:, span], part, cross_kv, ranges[:, span], cache)
            torch.testing.assert_close(logits, expected[:, span], rtol=0, atol=1e-4)
            done = end

    @pytest.mark.parametrize("name", TINY_NAMES)
    def test_generate_is_the_argmax_of_full_forwards(
        self, reference: Callable[[str], ReferenceModel], name: str
    ) -> None:
        model = reference(name)
        ids = random_ids(12)[0]
        cross_kv = None if name == "nvlm-d-tiny" else random_cross_kv(model, 2)
        memory = cross_kv[0][0].shape[1] if cross_kv else 0
        ranges = np.zeros((12, 2), np.int32)
        ranges[6:, 1] = memory // 2
        tokens = model.generate(EncodedPrompt(ids.numpy(), ranges, 0, memory), None, cross_kv, 10)
        assert len(set(tokens)) > 3
        for count, token in enumerate(tokens):
            sequence = torch.cat([ids, torch.tensor(tokens[:count], dtype=torch.long)])[None]
            everything = torch.tensor([[0, memory]] * count, dtype=torch.int32).reshape(count, 2)
            logits, _ = model(sequence, None, cross_kv, torch.cat([torch.from_numpy(ranges), everything])[None])
            assert token == int(logits[0, -1].argmax())

    def test_the_image_token_is_never_generated(self, reference: Callable[[str], ReferenceModel]) -> None:
        model = reference("nvlm-d-tiny")
        prompt = EncodedPrompt(random_ids(6)[0].numpy(), np.zeros((6, 2), np.int32), 0, 0)
        first, *_ = model.generate(prompt, None, None, 1)
        model.image_token_id, kept = first, model.image_token_id
        try:
            assert first not in model.generate(prompt, None, None, 20)
        finally:
            model.image_token_id = kept

    def test_image_tokens_replace_their_places_in_order(self, reference: Callable[[str], ReferenceModel]) -> None:
        """Image tokens that equal text embeddings give the logits of that text."""
        model = reference("nvlm-d-tiny")
        ids = random_ids(10)
        expected, _ = model(ids)
        spliced = ids.clone()
        spliced[0, [2, 3, 7]] = model.image_token_id
        logits, _ = model(spliced, model.language_model.embed(ids[0, [2, 3, 7]]))
        assert torch.equal(logits, expected)

    @pytest.mark.parametrize("given", [None, 2, 4])
    def test_a_wrong_number_of_image_tokens(
        self, reference: Callable[[str], ReferenceModel], given: int | None
    ) -> None:
        model = reference("nvlm-d-tiny")
        ids = random_ids(10)
        ids[0, :3] = model.image_token_id
        image = None if given is None else torch.zeros(given, model.config.llm.hidden_size)
        with pytest.raises(RequestError, match="3 image placeholders"):
            model(ids, image)

    def test_one_sequence_does_not_touch_another_of_its_batch(self, reference: Callable[[str], ReferenceModel]) -> None:
        model = reference("nvlm-x-tiny")
        cross_kv = random_cross_kv(model, 1)
        ids = torch.cat([random_ids(9, seed) for seed in range(3)])
        ranges = torch.tensor([[[0, 0]] * 9, [[0, 16]] * 9, [[2, 5]] * 9], dtype=torch.int32)
        together, _ = model(ids, None, cross_kv, ranges)
        for row in range(3):
            alone, _ = model(ids[row : row + 1], None, cross_kv, ranges[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-4)
