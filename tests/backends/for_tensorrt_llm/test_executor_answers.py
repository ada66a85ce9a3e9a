"""Tests answers of a pipeline over the executor: equal to the oracle's, whatever else is in the batch."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle_answers import answer_alone
from PIL import Image

from nvlm_trt.api import ChatRequest, Delta, Message, SamplingParams
from nvlm_trt.engine import Engine
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.pipeline import Pipeline

Directory = Callable[[str], Path]
Opened = Callable[..., Pipeline]
ROOT = Path(__file__).parents[3]
CHECKPOINTS, RECEIPT = ROOT / "checkpoints", ROOT / "docs" / "images" / "receipt.png"
ALL = [pytest.param(f"nvlm-{letter}-tiny", id=letter.upper()) for letter in "dxh"]


def make_image(seed: int, width: int = 160, height: int = 90) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def chat(text: str, *images: Any, **sampling: Any) -> ChatRequest:
    return ChatRequest([Message("user", text)], images, SamplingParams(**{"max_tokens": 12, **sampling}))


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


@pytest.mark.parametrize("name", ALL)
def test_a_mixed_batch_answers_as_the_oracle_does(
    opened: Opened, executors: list[Any], written: Directory, checkpoint: Directory, name: str
) -> None:
    """Text beside one image and two, greedy and sampled, with penalties: more requests than slots, prompts of several
    chunks."""
    pipeline, engine = opened(name), Engine.open(written(name))
    chats = [
        chat("What is written here? " * 4, max_tokens=20, ignore_eos=True),
        chat("Which?", make_image(1), max_tokens=15, ignore_eos=True),
        chat("And what do the two show?", make_image(2), make_image(3, 90, 60), max_tokens=9),
        chat("Guess.", temperature=1.3, top_k=20, seed=7, ignore_eos=True),
        chat("Guess again.", make_image(4, 60, 150), temperature=0.9, top_p=0.9, seed=8, repetition_penalty=1.2),
        chat("Last.", make_image(1), temperature=1.0, min_p=0.05, seed=1 << 63, logprobs=3),
        chat("A single tile?", make_image(5, 50, 50), max_tokens=30, repetition_penalty=1.1),
    ]
    with ThreadPoolExecutor(len(chats)) as pool:
        answers = list(pool.map(lambda one: list(pipeline.generate(one)), chats))
    for one, deltas in zip(chats, answers, strict=True):
        expected = answer_alone(engine, checkpoint(name), one)
        assert tokens_of(deltas) == [token_id for token_id, _ in expected]
        logprobs = [logprob for delta in deltas for logprob in delta.logprobs]
        assert len(logprobs) == (len(expected) if one.sampling.logprobs else 0)
        for found, (_, wanted) in zip(logprobs, expected, strict=False):
            assert wanted is not None
            assert [token.token_id for token in found.top] == [token_id for token_id, _ in wanted.top]
            assert math.isclose(found.logprob, wanted.logprob, abs_tol=1e-4)
        usage = deltas[-1].usage
        assert usage is not None
        assert usage.completion_tokens == len(expected)
    (executor,) = executors
    assert max(decoding for decoding, _ in executor.steps) == 3  # all slots together
    assert any(decoding and prompt for decoding, prompt in executor.steps)  # a prompt beside answers
    assert max(prompt for _, prompt in executor.steps) <= 40


@pytest.mark.parametrize("name", ALL)
def test_equals_the_engine_of_onnx_runtime(opened: Opened, engine: Directory, name: str) -> None:
    """From the same image tokens; both compute the LLM in float32 here."""
    config = Engine.open(engine(name)).config
    random = np.random.default_rng(0)
    shape = (3, config.tokens_per_tile, config.llm.hidden_size)
    # bf16 has the upper 16 bits of a float32
    tokens = (random.standard_normal(shape, np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    answers = []
    with Pipeline.open(engine(name), threads=1) as portable:
        for pipeline in (opened(name), portable):
            request = chat("What is this?", pipeline.import_tokens(tokens), max_tokens=20, ignore_eos=True)
            answers.append(tokens_of(list(pipeline.generate(request))))
    assert answers[0] == answers[1]
    assert len(answers[0]) == 20


@pytest.mark.parametrize("letter", ["d", "x", "h"])
def test_a_trained_model_reads_a_receipt(opened: Opened, executors: list[Any], written: Directory, letter: str) -> None:
    """In bf16 vision; the end-of-text token ends the answer, and is delivered without text as the batcher does it."""
    pipeline, checkpoint = opened(f"trained {letter}"), CHECKPOINTS / f"nvlm-{letter}-tiny"
    request = chat("What is the total?", RECEIPT.read_bytes(), max_tokens=40)
    deltas = list(pipeline.generate(request))
    expected = answer_alone(Engine.open(written(f"trained {letter}")), checkpoint, request)
    assert tokens_of(deltas) == [token_id for token_id, _ in expected]
    assert (deltas[-1].text, deltas[-1].finish_reason, len(deltas[-1].token_ids)) == ("", "stop", 1)
    assert any(character.isdigit() for character in "".join(delta.text for delta in deltas))
    (executor,) = executors
    stop_ids = Tokenizer.from_directory(written(f"trained {letter}")).stop_ids
    assert executor.received[0].stop_words == [[token_id] for token_id in sorted(stop_ids)]
    assert not executor.cancelled  # the executor has ended the answer by itself


def test_length_ends_at_max_tokens_and_at_the_engines_sequence(opened: Opened) -> None:
    pipeline = opened("nvlm-d-tiny")
    deltas = list(pipeline.generate(chat("Go.", max_tokens=5, ignore_eos=True)))
    assert (len(tokens_of(deltas)), deltas[-1].finish_reason) == (5, "length")
    deltas = list(pipeline.generate(chat("Go. " * 100, max_tokens=10_000, ignore_eos=True)))
    usage = deltas[-1].usage
    assert usage is not None
    assert deltas[-1].finish_reason == "length"
    assert usage.prompt_tokens + usage.completion_tokens == 512


def test_a_stop_string_that_begins_inside_a_token_ends_the_answer(opened: Opened, executors: list[Any]) -> None:
    """The text stream finds it, and the executor's request is cancelled: its place is free soon."""
    pipeline = opened("trained d")
    hot = {"max_tokens": 60, "temperature": 9.0, "seed": 1, "ignore_eos": True}  # any token of the vocabulary
    texts = [delta.text for delta in pipeline.generate(chat("Write on.", **hot))]
    # from the second character of a token to the first of the next
    index = next(i for i in range(1, 40) if len(texts[i]) > 1 and texts[i + 1])
    stop = texts[index][1:] + texts[index + 1][:1]
    before = "".join(texts[: index + 2])
    deltas = list(pipeline.generate(chat("Write on.", **hot, stop=stop)))
    assert "".join(delta.text for delta in deltas) == before[: before.index(stop)]
    assert deltas[-1].finish_reason == "stop"
    assert len(tokens_of(deltas)) <= index + 2
    (executor,) = executors
    assert executor.cancelled == [2]
    for _ in range(4):  # more than there are slots
        assert tokens_of(list(pipeline.generate(chat("Again.", max_tokens=2))))


def test_an_image_is_encoded_once(opened: Opened) -> None:
    pipeline = opened("nvlm-h-tiny")
    first = list(pipeline.generate(chat("What?", make_image(9))))
    second = list(pipeline.generate(chat("What?", make_image(9))))
    assert tokens_of(first) == tokens_of(second)
    assert first[-1].usage is not None
    assert second[-1].usage is not None
    assert (first[-1].usage.cached_images, second[-1].usage.cached_images) == (0, 1)
    metrics = pipeline.metrics()
    assert metrics.generator.requests_finished["length"] + metrics.generator.requests_finished["stop"] == 2
    assert metrics.generator.free_slots == 3
