"""Workloads are the same in every run, and prompts are exactly as long as asked."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trained_tokenizers import train_qwen2_like, train_yi_like

from nvlm_trt.api import Message
from nvlm_trt.benchmark import images
from nvlm_trt.benchmark.prompts import PromptWriter
from nvlm_trt.benchmark.questions import Question, StampedImage, questions
from nvlm_trt.benchmark.record import Record
from nvlm_trt.benchmark.workload import ImageSize, Lengths, Workload
from nvlm_trt.errors import RequestError
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.prompt.encoder import PromptEncoder
from nvlm_trt.prompt.tokenizer import Tokenizer, write_byte_tokenizer

WORKLOAD = Workload(
    prompt_tokens=Lengths(1, 300),
    output_tokens=Lengths(4, 9),
    images=2,
    image_sizes=(ImageSize(40, 30), ImageSize(30, 60)),
    repeat_images=False,
    max_tiles=3,
    requests=10,
    warmup=None,
    seed=7,
)


@pytest.fixture(scope="module", params=["bytes", "qwen2", "yi"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "qwen2":
        return Tokenizer(train_qwen2_like())
    if request.param == "yi":
        return Tokenizer(train_yi_like())
    directory = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(directory, 6)
    return Tokenizer.from_directory(directory)


@pytest.fixture
def prompts(tmp_path: Path) -> PromptWriter:
    write_byte_tokenizer(tmp_path, 6)
    return PromptWriter(Tokenizer.from_directory(tmp_path))


@pytest.mark.parametrize("tiles", [(), (1,), (1, 1)])
def test_prompts_are_as_long_as_asked(tokenizer: Tokenizer, tiles: tuple[int, ...]) -> None:
    """Counts tokens as the server does: the text's tokens come on top of format and images."""
    # an id that no text has: the Yi-like tokenizer names no image token
    config = dataclasses.replace(PRESETS["nvlm-d-small"], image_token_id=tokenizer.vocab_size)
    encoder = PromptEncoder(config, tokenizer)

    def tokens(text: str) -> int:
        return len(encoder.encode([Message("user", text)], tiles).input_ids)

    writer = PromptWriter(tokenizer)
    one = writer.write(1, np.random.default_rng(0))
    around = tokens(one) - 1
    for wanted in (1, 2, 3, 5, 17, 64, 333):
        text = writer.write(wanted, np.random.default_rng(wanted))
        assert tokens(text) - around == wanted


def test_texts_differ_but_are_the_same_in_every_run(prompts: PromptWriter) -> None:
    first, again = (questions(WORKLOAD, prompts, 30, "salt") for _ in range(2))
    assert first == again
    assert len({question.text for question in first}) == 30
    assert {question.output_tokens for question in first} == set(range(4, 10))
    assert {image.size for question in first for image in question.images} == set(WORKLOAD.image_sizes)
    assert questions(WORKLOAD, prompts, 5, "salt") == first[:5], "the count changes no question"
    other = questions(dataclasses.replace(WORKLOAD, seed=8), prompts, 30, "salt")
    assert [question.text for question in other] != [question.text for question in first]


def test_new_images_are_new_in_every_run(prompts: PromptWriter) -> None:
    def sent(workload: Workload, salt: str) -> list[bytes]:
        return [images.encode(image) for question in questions(workload, prompts, 6, salt) for image in question.images]

    new = [*sent(WORKLOAD, "a"), *sent(WORKLOAD, "b")]
    assert len(set(new)) == len(new) == 24
    repeated = dataclasses.replace(WORKLOAD, repeat_images=True, image_sizes=(ImageSize(40, 30),))
    assert len({*sent(repeated, "a"), *sent(repeated, "b")}) == 2, "the two images of a request"


def test_a_stamp_changes_bytes_but_no_pixel() -> None:
    size = ImageSize(90, 50)
    a, b = (images.encode(StampedImage(size, stamp)) for stamp in ("a", "another"))
    assert a != b
    opened = [Image.open(io.BytesIO(data)) for data in (a, b, images.draw(size))]
    assert [image.size for image in opened] == [(90, 50)] * 3
    assert len({image.tobytes() for image in opened}) == 1


def test_lengths_are_parsed_and_drawn(prompts: PromptWriter) -> None:
    rng = np.random.default_rng(0)
    assert {Lengths(3, 5).draw(rng) for _ in range(200)} == {3, 4, 5}
    assert [str(Lengths.parse(text, "--x")) for text in ("64", "16:128", "5:5")] == ["64", "16:128", "5"]
    for text in ("", "0", "-1", "1.5", "9:3", "3:", ":3", "a", "1:2:3", "99999999999"):
        with pytest.raises(RequestError, match="^--x .* is not a number of tokens; write 64"):
            Lengths.parse(text, "--x")


def test_sizes_are_parsed() -> None:
    assert str(ImageSize.parse("1344x896", "--x")) == "1344x896"
    for text in ("", "1344", "x", "1344X896", "-1x2", "axb", "1x2x3"):
        with pytest.raises(RequestError, match="is not WIDTHxHEIGHT"):
            ImageSize.parse(text, "--x")
    for text in ("0x5", "70000x1", "9000x9000"):
        with pytest.raises(RequestError, match="images of .* are not possible"):
            ImageSize.parse(text, "--x")


@pytest.mark.parametrize(
    "change", [{"images": -1}, {"images": 17}, {"image_sizes": ()}, {"requests": 0}, {"warmup": -1}, {"seed": -1}]
)
def test_impossible_workloads_are_an_error(change: dict[str, object]) -> None:
    with pytest.raises(RequestError):
        dataclasses.replace(WORKLOAD, **change)  # type: ignore[arg-type]


def test_image_options_without_images_make_no_other_workload() -> None:
    text_only = dataclasses.replace(WORKLOAD, images=0)
    other = dataclasses.replace(text_only, image_sizes=(ImageSize(9, 9),), repeat_images=True, max_tiles=None)
    assert text_only.to_dict() == other.to_dict()
    assert WORKLOAD.to_dict() != text_only.to_dict()


def test_questions_and_records_travel_as_json(prompts: PromptWriter) -> None:
    (question,) = questions(WORKLOAD, prompts, 1, "salt")
    assert Question.from_json(json.loads(json.dumps(question.to_json()))) == question
    record = Record(3, 4, 1, sent=2.0, due=1.5, ended=9.0, status="ok", arrivals=[(3.0, 1), (4.0, 2)])
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record
    moved = record.to_json(origin=1.0)
    assert (moved["sent"], moved["due"], moved["ended"], moved["arrivals"]) == (1.0, 0.5, 8.0, [(2.0, 1), (3.0, 2)])


class Stubborn:
    """Every text has an even number of tokens."""

    def encode(self, text: str) -> list[int]:
        return [0] * (2 * len(text))


def test_a_tokenizer_without_a_text_of_that_length_is_an_error() -> None:
    write: Callable[..., str] = PromptWriter(Stubborn()).write  # type: ignore[arg-type]
    assert len(write(10, np.random.default_rng(0))) == 5
    with pytest.raises(RequestError, match="no text of exactly 9 tokens"):
        write(9, np.random.default_rng(0))
