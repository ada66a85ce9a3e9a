"""Tests that metadata changes no pixel, damaged or not, except the orientation in EXIF."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from nvlm_trt.image.decoding import load_image


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    """-> [height, width, 3]"""
    return np.asarray(load_image(data)).astype(float)


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "segment",
    [
        b"\xff\xe2\x00\x0eICC_PROFILE\0",
        b"\xff\xed\x00\x1aPhotoshop 3.0\x008BIM\x04\x04\x00\x00\xff\xff",
        b"\xff\xe0\x00\x08JFIF\0\1",
        b"\xff\xee\x00\x08Adobe\0",
        b"\xff\xe2\x00\x10MPF\0II*\0\xff\xff\xff\xff\0\0",
        b"\xff\xfe\x00\x02",
        b"\xff\xff\xfe\x00\x03a",  # after a fill byte
    ],
    ids=["colour profile", "Photoshop", "JFIF", "Adobe", "several images", "comment", "fill byte"],
)
def test_damaged_metadata_of_a_jpeg_is_ignored(segment: bytes) -> None:
    data = encode(noise(), "JPEG", quality=95)
    np.testing.assert_array_equal(decoded(data[:20] + segment + data[20:]), decoded(data))
    np.testing.assert_array_equal(decoded(data[:2] + segment + data[2:]), decoded(data))


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_colours_of_a_jpeg_do_not_depend_on_metadata(mode: str) -> None:
    image = noise().convert(mode)
    data = encode(image, "JPEG", quality=95, comment=b"hello", icc_profile=bytes(200_000), xmp=b"<x/>")
    with Image.open(io.BytesIO(data)) as stored:
        np.testing.assert_array_equal(decoded(data), np.asarray(stored.convert("RGB")))


def test_adobe_rgb_jpeg_keeps_its_colours() -> None:
    image = noise()
    data = encode(image, "JPEG", quality=100, subsampling=0, keep_rgb=True)
    np.testing.assert_allclose(decoded(data), np.asarray(image), atol=3)


def test_only_exif_says_which_way_is_up() -> None:
    image = noise()
    xmp = b'<x tiff:Orientation="6"/>'
    for image_format in ("JPEG", "WEBP"):
        assert load_image(encode(image, image_format, xmp=xmp)).size == image.size
    assert decoded(encode(image, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")).shape == (40, 60, 3)
