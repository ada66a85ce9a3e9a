"""Tests that an error names what was sent in place of an image."""

from __future__ import annotations

import io
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nvlm_trt.errors import ImageError
from nvlm_trt.image import decoding
from nvlm_trt.image.decoding import FORMATS, load_image
from nvlm_trt.image.file_signature import foreign_format, is_avif


def media(major: bytes, *compatible: bytes) -> bytes:
    brands = b"".join(compatible)
    return (16 + len(brands)).to_bytes(4, "big") + b"ftyp" + major + bytes(4) + brands + bytes(50)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (media(b"heic", b"mif1", b"heic"), "a HEIC image, not a readable format; convert it to PNG or JPEG"),
        (media(b"mif1", b"mif1", b"heix"), "a HEIC image"),
        (media(b"mif1", b"mif1"), "a HEIF image"),
        (b"\x00\x00\x00\x0cJXL \r\n\x87\n" + bytes(20), "a JPEG XL image, not a readable format; convert it"),
        (b"\xff\x0a" + bytes(20), "a JPEG XL image"),
        (b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(20), "a JPEG 2000 image"),
        (b"%PDF-1.7\n%...", "a PDF document, not a readable format; save the page as PNG or JPEG"),
        (b"\r\n%PDF-1.4", "a PDF document"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing, not a readable format; render it as PNG"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- a --> <!-- b -->\n<SVG width="5">', "an SVG drawing"),
        (b'<?xml version="1.0"?><!DOCTYPE svg PUBLIC "-//W3C">\n<svg>', "an SVG drawing"),
        (b"<!DOCTYPE html><html>404</html>", "an HTML page, not a readable format; download the image itself"),
        (b"\n  <html lang='en'>", "an HTML page"),
        (b"<!-- saved from --><!doctype HTML>", "an HTML page"),
        (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "an XML document"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n",
            "a Git LFS pointer, not a readable format; fetch the image with `git lfs pull`",
        ),
        (b"/annex/objects/SHA256E-s1--1.png\n", "a git-annex pointer"),
        (media(b"isom", b"isom", b"mp41"), "an MP4 video, not a readable format; save one of its frames"),
        (media(b"qt  "), "a QuickTime video"),
        (media(b"M4A "), "an audio file"),
        (media(b"crx "), "a camera's raw photograph"),
        (b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\x01\x42\x82\x84webm", "a WebM video, not a readable format; save one of"),
        (b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\x01\x42\x82\x88matroska", "a Matroska video"),
        (b"RIFF\x10\0\0\0AVI LIST", "an AVI video"),
        (b"PK\x03\x04" + bytes(30), "a ZIP archive or an Office document"),
        (b"\x1f\x8b\x08" + bytes(30), "a gzip archive"),
        (b"8BPS\0\1", "a Photoshop document"),
        (b"\x89PNG\n\x1a\n", "a PNG damaged by a transfer in text mode"),
        (b"iVBORw0KGgoAAAANSUhEUg==", "an image in base64, not a readable format; decode it"),
        (b"data:image/png;base64,iVBORw0KGgo=", "a data URL"),
        (b"https://example.com/image.png\n", "a link"),
        (b'{"error": "not found"}', "a JSON document"),
        (bytes(5000), "5000 zero bytes"),
        (b"just a note", "not a readable, non-empty PNG, JPEG"),
    ],
)
def test_error_names_what_was_sent(data: bytes, message: str) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(data)
    assert str(caught.value).startswith(f"image: {message}")
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)


@pytest.mark.parametrize("image_format", FORMATS)
def test_readable_formats_are_not_foreign(image_format: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(buffer, image_format)
    assert foreign_format(buffer.getvalue()) is None
    assert is_avif(buffer.getvalue()) == (image_format == "AVIF")


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_other_signatures_within_an_image_do_not_matter(image_format: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(buffer, image_format)
    for text in (b"%PDF-1.7", b"\0" * 116 + b"DICM", b"\0" * 245 + b"ustar"):
        assert foreign_format(buffer.getvalue()[:12] + text + buffer.getvalue()[12:]) is None
    assert foreign_format(b"II*\0\x10\0\0\0CR\x02\0") is not None  # a TIFF only in form


def test_avif_without_a_decoder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "FORMATS", tuple(name for name in FORMATS if name != "AVIF"))
    monkeypatch.setattr(decoding, "_READS_AVIF", False)
    with pytest.raises(ImageError, match="an AVIF image, which this Pillow does not read; convert it to PNG or JPEG"):
        load_image(media(b"avif", b"avif", b"mif1"))


@given(st.lists(st.sampled_from([b"<!--", b"-->", b"<?xml", b">", b" ", b"a", b"<!doctype svg", b"../"]), max_size=400))
def test_any_text_is_looked_at_quickly(parts: list[bytes]) -> None:
    start = time.monotonic()
    foreign_format(b"".join(parts))
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("text", [b"<!---->" * 200, b"<?xml>" * 200 + b"<", b"../" * 400, b"<!--" * 300])
def test_repeated_markup_is_looked_at_quickly(text: bytes) -> None:
    start = time.monotonic()
    foreign_format(text)
    assert time.monotonic() - start < 1
