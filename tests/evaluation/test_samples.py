"""Tests sample sets in JSONL: accepted sets, and errors that name the line of a fault."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nvlm_trt.errors import ImageError, RequestError
from nvlm_trt.evaluation.samples import ImageFiles, Sample, digest_of, read_samples

Write = Callable[..., Path]
GOOD = {"prompt": "How much?", "answer": "12"}


def png(colour: str) -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(encoded, "PNG")
    return encoded.getvalue()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(line, ...)` writes a set of objects (or of raw lines), with the images red.png and blue.png beside it."""
    (tmp_path / "images").mkdir()
    for colour in ("red", "blue"):
        (tmp_path / "images" / f"{colour}.png").write_bytes(png(colour))

    def make(*lines: Any) -> Path:
        path = tmp_path / "set.jsonl"
        encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"".join(line + b"\n" for line in encoded))
        return path

    return make


def test_a_set_with_all_keys_and_one_with_none(write: Write) -> None:
    path = write(
        {"image": "images/red.png", "prompt": "Which?", "answer": "red", "task": "colour", "name": "a"},
        b"",
        {"images": ["images/red.png", "images/blue.png"], "metric": "anls", **GOOD},
        GOOD,
    )
    one, two, text = read_samples(path, "contains")
    assert (one.name, one.task, one.prompt, one.answer, one.metric) == ("a", "colour", "Which?", "red", "contains")
    assert list(one.images) == [png("red")]
    assert (two.name, two.task, two.metric) == ("3", "default", "anls")  # the blank line counts
    assert list(two.images) == [png("red"), png("blue")]
    assert (text.name, len(text.images)) == ("4", 0)


def test_a_byte_order_mark_is_no_fault(write: Write) -> None:
    assert read_samples(write(b"\xef\xbb\xbf" + json.dumps(GOOD).encode()))[0].answer == "12"


def test_images_are_read_when_they_are_asked_for(write: Write) -> None:
    (sample,) = read_samples(write({"image": "images/red.png", **GOOD}))
    assert isinstance(sample.images, ImageFiles)
    sample.images.paths[0].write_bytes(b"other")
    assert sample.images[0] == b"other"
    assert list(sample.images[:1]) == [b"other"]
    sample.images.paths[0].unlink()
    with pytest.raises(RequestError, match=r"cannot read image .*red\.png"):
        sample.images[0]


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": ' + b"1" * 5000 + b"}", "not JSON"),
        ([GOOD], "not an object"),
        ({"prompt": "How much?"}, "no 'answer'"),
        ({"answer": "12"}, "no 'prompt'"),
        (GOOD | {"anwser": "12"}, "unknown key 'anwser'"),
        (GOOD | {"metric": "bleu"}, "unknown metric 'bleu'; choose one of exact, contains, anls, numeric"),
        (GOOD | {"metric": ["exact"]}, "'metric' must be a string"),
        (GOOD | {"answer": 12}, "'answer' must be a string"),
        (GOOD | {"answer": " "}, "'answer' must be a string that is not blank"),
        (GOOD | {"prompt": ""}, "'prompt' must be a string that is not blank"),
        (GOOD | {"prompt": "\ud800"}, "surrogate"),
        (GOOD | {"name": None}, "'name' must be a string"),
        (GOOD | {"answer": "a dozen", "metric": "numeric"}, "'a dozen' is not a number"),
        (GOOD | {"image": "images/green.png"}, "there is no image"),
        (GOOD | {"image": "images"}, "there is no image"),
        (GOOD | {"image": "x" * 5000}, "there is no image"),
        (GOOD | {"image": "a\0b"}, "there is no image"),
        (GOOD | {"image": ["images/red.png"]}, "'image' must be a path"),
        (GOOD | {"images": "images/red.png"}, "'images' a list of paths"),
        (GOOD | {"image": "images/red.png", "images": []}, "both 'image' and 'images'"),
        (GOOD | {"image": "images/red.png", "prompt": "<image> and <image>"}, "2 <image> marks for 1 images"),
        (GOOD | {"name": "1"}, "the name '1' is that of line 1"),
    ],
)
def test_faults_are_named_with_their_line(write: Write, line: Any, fragment: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_samples(write(GOOD, line))
    assert "set.jsonl line 2: " in str(caught.value)
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [[], [b"", b"  "]])
def test_an_empty_set(write: Write, content: list[bytes]) -> None:
    with pytest.raises(RequestError, match="has no samples"):
        read_samples(write(*content))


def test_a_set_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot read samples"):
        read_samples(tmp_path / "none.jsonl")
    with pytest.raises(RequestError, match="cannot read samples"):
        read_samples(tmp_path)


def test_the_digest_is_of_everything_in_a_set() -> None:
    base = Sample("1", "task", "prompt", "answer", (png("red"),))
    others = [
        Sample("2", "task", "prompt", "answer", (png("red"),)),
        Sample("1", "other", "prompt", "answer", (png("red"),)),
        Sample("1", "task", "other", "answer", (png("red"),)),
        Sample("1", "task", "prompt", "other", (png("red"),)),
        Sample("1", "task", "prompt", "answer", (png("blue"),)),
        Sample("1", "task", "prompt", "answer", (png("red"), png("red"))),
        Sample("1", "task", "prompt", "answer", (png("red"),), "anls"),
    ]
    digests = {digest_of(samples) for samples in ([base], *([other] for other in others), [base, others[0]])}
    assert len(digests) == len(others) + 2
    assert digest_of([base]) == digest_of([Sample("1", "task", "prompt", "answer", (png("red"),))])


def test_where_an_image_lies_is_not_part_of_the_digest(write: Write) -> None:
    path = write({"image": "images/red.png", **GOOD})
    before = digest_of(read_samples(path))
    (path.parent / "images" / "red.png").rename(path.parent / "moved.png")
    assert digest_of(read_samples(write({"image": "moved.png", **GOOD}))) == before


@pytest.mark.parametrize("data", [b"", b"not an image", png("red")[:45]], ids=["empty", "text", "cut"])
def test_a_broken_image_is_found_before_anything_is_asked(write: Write, data: bytes) -> None:
    path = write(GOOD, {"images": ["images/red.png", "images/blue.png"], "name": "pair", **GOOD})
    (path.parent / "images" / "blue.png").write_bytes(data)
    with pytest.raises(ImageError, match=r"sample pair: .*blue\.png: "):
        digest_of(read_samples(path))
    with pytest.raises(ImageError, match="sample drawn: image 1: "):
        digest_of([Sample("drawn", "task", "prompt", "answer", (data,))])
