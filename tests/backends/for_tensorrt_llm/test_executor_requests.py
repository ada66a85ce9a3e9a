"""Tests what the executor is given: prompt tables, digests, features and masks, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle_answers import answer_alone, image_tokens
from test_executor_answers import chat, make_image, tokens_of
from written_engines import rewrite, write_engine_directory

from nvlm_trt.backends.tensorrt_llm.image_features import digest_of
from nvlm_trt.backends.tensorrt_llm.masks import cross_attention_mask
from nvlm_trt.engine import Engine
from nvlm_trt.errors import TooLargeError
from nvlm_trt.prompt.conversation import lift_images
from nvlm_trt.prompt.encoder import PromptEncoder
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.pipeline import Pipeline

Directory = Callable[[str], Path]
Opened = Callable[..., Pipeline]


def ask(pipeline: Pipeline, *images: Any, text: str = "What?") -> list[int]:
    return tokens_of(list(pipeline.generate(chat(text, *images, max_tokens=2, ignore_eos=True))))


# --- D: the prompt table ---------------------------------------------------------------------------------------------


def test_placeholders_are_rows_of_one_table(opened: Opened, executors: list[Any], written: Directory) -> None:
    """Placeholder k of all images has the id vocab_size + k, and row k is image embedding k, in bf16."""
    engine = Engine.open(written("nvlm-d-tiny"))
    images = make_image(1), make_image(2, 60, 60)
    ask(opened("nvlm-d-tiny"), *images)
    (request,) = executors[0].received
    rows = torch.cat([image_tokens(engine, image).flatten(0, 1) for image in images])
    table = request.prompt_tuning_config.embedding_table
    assert table.dtype == torch.bfloat16
    assert torch.equal(table.float(), rows)
    ids, vocab = request.input_token_ids, engine.config.llm.vocab_size
    assert [i for i in ids if i >= vocab] == list(range(vocab, vocab + len(rows)))
    assert engine.config.image_token_id not in ids
    assert request.bad_words == [[engine.config.image_token_id]]
    assert request.stop_words is None  # ignore_eos
    assert request.end_id == -1


def test_extra_ids_mark_the_tokens_of_each_image(opened: Opened, executors: list[Any], written: Directory) -> None:
    engine = Engine.open(written("nvlm-d-tiny"))
    ask(opened("nvlm-d-tiny"), make_image(1), make_image(2), make_image(1))
    (request,) = executors[0].received
    extra = np.array(request.prompt_tuning_config.input_token_extra_ids, np.uint64)
    places = np.array(request.input_token_ids) >= engine.config.llm.vocab_size
    assert not extra[~places].any()
    first, second, third = np.split(extra[places], 3)
    assert len(set(first.tolist())) == 1
    assert np.array_equal(first, third)
    assert not set(first.tolist()) & set(second.tolist())
    assert extra[places].all()


def test_two_images_of_one_shape_share_no_kv(
    opened: Opened, executors: list[Any], written: Directory, checkpoint: Directory
) -> None:
    """The same prompt, the same token ids, other pixels. The stand-in reuses KV as the real executor does."""
    name, pipeline = "nvlm-d-tiny", opened("nvlm-d-tiny")
    first, second = (chat("What is this?", make_image(seed), max_tokens=16, ignore_eos=True) for seed in (1, 2))
    answers = [tokens_of(list(pipeline.generate(one))) for one in (first, second, first)]
    (executor,) = executors
    token_ids = [request.input_token_ids for request in executor.received]
    assert token_ids[0] == token_ids[1] == token_ids[2]
    engine = Engine.open(written(name))
    expected = [[i for i, _ in answer_alone(engine, checkpoint(name), one)] for one in (first, second)]
    assert expected[0] != expected[1]  # else sharing would not show
    assert answers == [*expected, expected[0]]
    system = len(token_ids[0]) - len(token_ids[0]) % 16
    assert executor.reused >= system  # the third request took what the first had left, image included


def test_kv_is_shared_wrongly_without_extra_ids(
    opened: Opened, executors: list[Any], written: Directory, checkpoint: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the test above: with one digest for all images, the second answer is the first's."""
    monkeypatch.setattr("nvlm_trt.backends.tensorrt_llm.image_features.digest_of", lambda embeddings: 1)
    pipeline = opened("nvlm-d-tiny")
    answers = [
        tokens_of(list(pipeline.generate(chat("What is this?", make_image(seed), max_tokens=16, ignore_eos=True))))
        for seed in (1, 2)
    ]
    assert answers[0] == answers[1]


def test_digests_follow_the_numbers() -> None:
    embeddings = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    other = embeddings.clone()
    other[3, 7] += 1
    assert digest_of(embeddings) == digest_of(embeddings.clone())
    assert digest_of(embeddings) != digest_of(other)
    assert 1 <= digest_of(embeddings) < 1 << 64
    assert digest_of(embeddings[:0]) == 0


def test_a_table_of_more_rows_than_the_engine_takes_is_refused(
    executors: list[Any], checkpoint: Directory, tmp_path: Path
) -> None:
    engine = rewrite(write_engine_directory(checkpoint("nvlm-d-tiny"), tmp_path / "engine"), max_prompt_table=100)
    with Pipeline.open(engine.path) as pipeline:
        with pytest.raises(TooLargeError, match="144 image embeddings, the engine takes 100 per request"):
            ask(pipeline, *(make_image(seed) for seed in (1, 2, 3)))
        assert ask(pipeline, make_image(2, 50, 50))  # one tile
        assert executors[0].received[-1].prompt_tuning_config is not None


# --- X and H: features and masks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nvlm-x-tiny", "nvlm-h-tiny"])
def test_masks_are_the_ranges_byte_for_byte(
    opened: Opened, executors: list[Any], written: Directory, name: str
) -> None:
    engine = Engine.open(written(name))
    ask(opened(name), make_image(1), make_image(2, 90, 60), text="Both, please.")
    (request,) = executors[0].received
    tiles = [len(image_tokens(engine, image)) for image in (make_image(1), make_image(2, 90, 60))]
    encoder = PromptEncoder(engine.config, Tokenizer.from_directory(engine.path))
    messages, _ = lift_images(chat("Both, please.").messages, [b"", b""])
    prompt = encoder.encode(messages, tiles)
    assert len(prompt.input_ids) == len(request.input_token_ids)
    expected = np.zeros((len(prompt.input_ids), prompt.cross_tokens), np.bool_)
    for row, (start, end) in enumerate(prompt.cross_ranges):
        expected[row, start:end] = True
    assert request.cross_attention_mask.numpy().tobytes() == expected.tobytes()
    assert request.cross_attention_mask.dtype == torch.bool
    assert expected[-1].all()  # what generated tokens repeat
    assert not expected[0].any()
    assert request.encoder_output_length == prompt.cross_tokens == len(request.encoder_input_features)
    assert request.skip_cross_attn_blocks.tolist() == [False]
    if name == "nvlm-x-tiny":
        assert request.prompt_tuning_config is None
    else:
        assert request.prompt_tuning_config.input_token_extra_ids is None  # no KV is reused


def test_h_reads_each_tag_before_its_tile(opened: Opened, executors: list[Any], written: Directory) -> None:
    from safetensors.torch import load_file

    engine = Engine.open(written("nvlm-h-tiny"))
    ask(opened("nvlm-h-tiny"), make_image(1))
    (request,) = executors[0].received
    tokens = image_tokens(engine, make_image(1))  # [n + 1, T, hidden]
    tags = load_file(engine.path / "tag_embeddings.safetensors")["tag_embeddings"].float()
    wanted = torch.cat([part for tag, tile in zip(tags, tokens[:-1], strict=False) for part in (tag, tile)])
    assert torch.equal(request.encoder_input_features.float(), wanted)
    assert torch.equal(request.prompt_tuning_config.embedding_table.float(), tokens[-1])


@pytest.mark.parametrize("name", ["nvlm-x-tiny", "nvlm-h-tiny"])
def test_text_alone_brings_a_row_that_nobody_reads(opened: Opened, executors: list[Any], name: str) -> None:
    ask(opened(name), text="No image.")
    (request,) = executors[0].received
    assert request.encoder_input_features.shape[0] == request.encoder_output_length == 1
    assert not request.encoder_input_features.any()
    assert tuple(request.cross_attention_mask.shape) == (len(request.input_token_ids), 1)
    assert not request.cross_attention_mask.any()
    assert request.skip_cross_attn_blocks.tolist() == [True]
    assert request.prompt_tuning_config is None


def test_d_brings_no_features(opened: Opened, executors: list[Any]) -> None:
    ask(opened("nvlm-d-tiny"), make_image(1))
    (request,) = executors[0].received
    assert request.encoder_input_features is request.cross_attention_mask is request.skip_cross_attn_blocks is None


@st.composite
def ranges_in(draw: st.DrawFn) -> tuple[npt.NDArray[np.int32], int]:
    columns = draw(st.integers(1, 40))
    pairs = st.tuples(st.integers(0, columns), st.integers(0, columns)).map(sorted)
    return np.array(draw(st.lists(pairs, min_size=1, max_size=20)), np.int32), columns


@given(ranges_in())
def test_mask_of_any_ranges(drawn: tuple[npt.NDArray[np.int32], int]) -> None:
    ranges, columns = drawn
    mask = cross_attention_mask(ranges, columns, "cpu").numpy()
    assert mask.shape == (len(ranges), columns)
    for row, (start, end) in zip(mask, ranges, strict=True):
        assert row.tolist() == [start <= column < end for column in range(columns)]
