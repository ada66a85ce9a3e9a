"""Tests that images sent as base64 text become their files, and that files stay as they are."""

from __future__ import annotations

import base64
import io
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nvlm_trt.errors import ImageError, TooLargeError
from nvlm_trt.image.decoding import FORMATS, ImageLimits, load_image
from nvlm_trt.serving import sent_images
from nvlm_trt.serving.sent_images import image_files

LIMITS = ImageLimits(max_bytes=100_000, max_images=3)


def encode(kind: str, mode: str = "RGB") -> bytes:
    encoded = io.BytesIO()
    blocks = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(blocks).convert(mode).save(encoded, kind)
    return encoded.getvalue()


FILES = [(kind, encode(kind, mode)) for kind in FORMATS for mode in ("RGB", "L", "1") if (kind, mode) != ("JPEG", "1")]
PNG = encode("PNG")
FILE_CHUNK = sent_images._CHUNK * 3 // 4
TEXT = base64.b64encode(PNG)


@pytest.mark.parametrize(("kind", "file"), FILES)
def test_a_file_and_its_text_are_the_same_image(kind: str, file: bytes) -> None:
    text = base64.b64encode(file)
    uris = [f"data:image/{kind.lower()};base64,".encode() + text, b"DATA:Image/x-icon;BASE64," + text]
    for sent in (file, text, *uris):
        assert image_files([sent], LIMITS) == [file]
    load_image(file)
    assert image_files([file, text, uris[0]], LIMITS) == [file] * 3


def test_no_file_begins_like_the_text_of_a_file() -> None:
    for file in sent_images._FILE_STARTS:
        for text in sent_images._TEXT_STARTS:
            assert not file.startswith(text)
            assert not text.startswith(file)


@given(st.binary(max_size=40), st.sampled_from(sent_images._FILE_STARTS))
def test_the_text_of_any_file_is_decoded(rest: bytes, start: bytes) -> None:
    file = start + rest
    assert image_files([file, base64.b64encode(file)], LIMITS) == [file, file]


@pytest.mark.parametrize("size", [FILE_CHUNK + extra for extra in (-1, 0, 1, 2, 3)] + [5 << 20])
def test_texts_of_several_chunks(size: int) -> None:
    file = PNG + random.Random(size).randbytes(size - len(PNG))
    assert image_files([base64.b64encode(file)], ImageLimits()) == [file]


def test_padding_at_the_end_of_a_chunk_is_wrong() -> None:
    chunk = base64.b64encode(PNG + bytes(FILE_CHUNK - len(PNG) - 1))
    assert (len(chunk), chunk[-1:]) == (sent_images._CHUNK, b"=")
    with pytest.raises(ImageError, match="^image: wrong base64"):
        image_files([chunk + b"AAAA"], ImageLimits())


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (TEXT[:-1], "image 2: wrong base64 ("),
        (TEXT[:-3] + b"===", "image 2: wrong base64 ("),
        (TEXT[:400] + b"\n" + TEXT[400:], "image 2: wrong base64 ("),
        (TEXT[:401] + b"-_" + TEXT[403:], "image 2: wrong base64 ("),
        (TEXT[:400] + b"====" + TEXT[404:], "image 2: wrong base64 ("),
        (TEXT + b"\n", "image 2: wrong base64 ("),
        (b"  " + TEXT, "image 2: a text that is not the base64 text of an image"),
        (base64.urlsafe_b64encode(b"\xff\xd8\xff" + bytes(90)), "image 2: a text that is not the base64"),
        (base64.b64encode(b"%PDF-1.7" + bytes(90)), "image 2: a text that is not the base64"),
        (b"https://example.com/" + b"a" * 60, "image 2: a text that is not the base64"),
        (b"data:image/png," + TEXT, "image 2: the data URI does not begin"),
        (b"data:text/plain;base64," + TEXT, "image 2: the data URI does not begin"),
        (b"data:image/png;base64, " + TEXT, "image 2: wrong base64 ("),
    ],
)
def test_a_wrong_text_is_named_in_one_line(sent: bytes, message: str) -> None:
    with pytest.raises(ImageError) as raised:
        image_files([PNG, sent], LIMITS)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("uri", [b"", b"data:image/png;base64,"])
def test_the_limit_holds_for_the_file_and_before_it_is_decoded(uri: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    file = PNG + bytes(LIMITS.max_bytes - len(PNG))
    assert image_files([uri + base64.b64encode(file)], LIMITS) == [file]
    monkeypatch.setattr(base64, "b64decode", None)
    for extra in (1, 2, 3, 10**6):
        with pytest.raises(ImageError, match=f"^image: {len(file) + extra} bytes encoded, at most 100000 are allowed"):
            image_files([uri + base64.b64encode(file + bytes(extra))], LIMITS)


def test_too_many_images_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base64, "b64decode", None)
    with pytest.raises(TooLargeError, match="4 images, at most 3"):
        image_files([TEXT] * 4, LIMITS)


def test_what_is_neither_file_nor_text_is_left_to_the_decoder() -> None:
    others = [b"", b"one", bytes(100)]
    assert image_files(others, LIMITS) == others
