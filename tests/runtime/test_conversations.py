"""Tests with real engines that what an earlier request has left changes no bit of an answer, and crosses no image."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nvlm_trt.api import Answer, ChatRequest, ImagePart, Message, SamplingParams, TextPart, merge_answers
from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine
from nvlm_trt.runtime.pipeline import Pipeline, RuntimeOptions

Directory = Callable[[str], Path]
CHUNK = 32
NAMES = [f"nvlm-{letter}-tiny" for letter in "dxh"]
SAMPLING: dict[str, Any] = {"max_tokens": 10, "logprobs": 20, "ignore_eos": True}
GREEDY, DRAWN = SamplingParams(**SAMPLING), SamplingParams(temperature=1.3, top_p=0.95, seed=5, **SAMPLING)


def image(seed: int, width: int = 160, height: int = 90) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module", params=["fp32", "int8"])
def engine_of(
    request: pytest.FixtureRequest,
    engine: Directory,
    checkpoint: Directory,
    tmp_path_factory: pytest.TempPathFactory,
) -> Directory:
    """`engine_of("nvlm-h-tiny")` is the directory of an engine in one of two precisions."""
    if request.param == "fp32":
        return engine
    root = tmp_path_factory.mktemp("int8")
    (root / "image.png").write_bytes(image(9))
    question = {"prompt": "What is the total?", "answer": "9", "image": str(root / "image.png")}
    samples = root / "samples.jsonl"
    samples.write_text(json.dumps(question) + "\n")

    def make(name: str) -> Path:
        if not (root / name).exists():
            options = QuantizationOptions(calibration=samples, gate=None)
            build_engine(checkpoint(name), root / name, precision="int8", quantization=options)
        return root / name

    return make


def opened(directory: Path, reuse: bool) -> Pipeline:
    return Pipeline.open(directory, threads=1, options=RuntimeOptions(prefill_chunk=CHUNK, reuse_prompts=reuse))


def ask(pipeline: Pipeline, messages: Sequence[Message], sampling: SamplingParams = GREEDY) -> Answer:
    (answer,) = merge_answers(list(pipeline.generate(ChatRequest(messages, (), sampling))))
    return answer


def cached(answer: Answer) -> int:
    assert answer.usage is not None
    return answer.usage.cached_tokens


def turns(*images: bytes) -> Iterator[list[Message]]:
    """Three questions of one conversation, of which the first two bring images."""
    said = [Message("system", "Be brief, and answer the questions that are asked about the images.")]
    for number in range(3):
        picture = [ImagePart(images[number])] if number < len(images) else []
        said.append(Message("user", [*picture, TextPart(f"Question {number}: what is written in the last image?")]))
        yield list(said)
        said.append(Message("assistant", f"Nothing that could be read, answer {number}."))


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_the_same_bit_for_bit_with_and_without_reuse(engine_of: Directory, name: str) -> None:
    """The log-probabilities show a difference in the last bit of a logit. Three conversations take turns, two of which
    have images of the same tokens and another content; then all are asked again at once."""
    conversations = [list(turns(image(1), image(2, 90, 200))), list(turns(image(3), image(2, 90, 200)))]
    conversations.append(list(turns()))
    questions = [conversation[number] for number in range(3) for conversation in conversations]
    samplings = [GREEDY, DRAWN] * len(questions)
    with opened(engine_of(name), reuse=False) as pipeline:
        expected = [ask(pipeline, *both) for both in zip(questions, samplings, strict=False)]
        assert not any(map(cached, expected))
    with opened(engine_of(name), reuse=True) as pipeline:
        answers = [ask(pipeline, *both) for both in zip(questions, samplings, strict=False)]
        with ThreadPoolExecutor(len(questions)) as pool:
            together = list(pool.map(lambda both: ask(pipeline, *both), zip(questions, samplings, strict=False)))
        metrics = pipeline.metrics().generator
    for answer, again, other in zip(answers, together, expected, strict=True):
        assert np.isfinite([item.logprob for item in other.logprobs]).all()
        assert answer.logprobs == other.logprobs
        assert again.logprobs == other.logprobs
    assert cached(answers[0]) == 0
    usage = [answer.usage for answer in answers if answer.usage]
    for before, after in zip(usage[:6], usage[3:], strict=True):  # the next question of the same conversation
        assert after.cached_tokens >= before.prompt_tokens // CHUNK * CHUNK > 0
    everything = [*usage, *(answer.usage for answer in together if answer.usage)]
    assert metrics.cached_tokens == sum(each.cached_tokens for each in everything)
    assert metrics.prompt_tokens == sum(each.prompt_tokens for each in everything)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_shared_across_images_of_the_same_tokens(engine_of: Directory, name: str) -> None:
    """The prompts differ in pixels alone. Up to the image they share the system message."""
    (one, *_), (other, *_) = turns(image(1)), turns(image(2))
    with opened(engine_of(name), reuse=True) as pipeline:
        first, second = ask(pipeline, one), ask(pipeline, other)
        again = ask(pipeline, one)
    assert first.usage is not None
    assert second.usage is not None
    assert first.usage.prompt_tokens == second.usage.prompt_tokens
    before_the_image = len("<|im_start|>system\n") + len(str(one[0].content))  # at most so many tokens, of a byte each
    assert 0 < cached(second) <= before_the_image + len("<|im_end|>\n<|im_start|>user\n<Image><tile_1>")
    assert cached(again) > cached(second) + CHUNK
    assert again.logprobs == first.logprobs
    assert second.logprobs != first.logprobs


def test_image_tokens_of_the_callers_are_never_shared(engine: Directory) -> None:
    """Nobody says whether they are equal."""
    tokens = np.random.default_rng(0).standard_normal((7, 16, 192), dtype=np.float32)
    request = ChatRequest([Message("user", "What is written here? " * 3)], (tokens,), GREEDY)
    with opened(engine("nvlm-d-tiny"), reuse=True) as pipeline:
        first, second = (merge_answers(list(pipeline.generate(request)))[0] for _ in range(2))
    assert first.usage is not None
    assert first.logprobs == second.logprobs
    assert cached(second) <= CHUNK < first.usage.prompt_tokens // 2
