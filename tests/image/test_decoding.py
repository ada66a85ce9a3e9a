"""Tests decoding of all accepted modes and formats, and the one-line errors for other files."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from nvlm_trt.errors import ConfigError, ImageError
from nvlm_trt.image.decoding import FORMATS, MAX_ASPECT, MIN_EDGE, ImageLimits, load_image

# installed by nvlm_trt.image for the process, which pytest's own filters hide
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]

RAMP = np.linspace(0, 255, 64 * 32).reshape(32, 64)  # [height, width], black to white


def encode(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    """-> [height, width, 3], as float so that differences do not wrap around"""
    image = load_image(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(float)


def noise(width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG of RGB pixels whose header may promise more than `data` holds."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


# --- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", FORMATS)
def test_every_format_decodes(image_format: str) -> None:
    image = Image.fromarray(RAMP.astype(np.uint8)).convert("RGB")
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(image_format, {})
    difference = np.abs(decoded(encode(image, image_format, **lossless)) - np.asarray(image))
    assert difference.max() <= 2


@pytest.mark.parametrize(
    ("mode", "image_format"),
    [("1", "PNG"), ("1", "TIFF"), ("L", "PNG"), ("P", "PNG"), ("P", "GIF"), ("CMYK", "TIFF"), ("YCbCr", "TIFF")],
)
def test_opaque_modes_convert_as_pillow_does(mode: str, image_format: str) -> None:
    data = encode(noise().convert(mode), image_format)
    with Image.open(io.BytesIO(data)) as image:
        want = image.convert("RGB")
    np.testing.assert_array_equal(decoded(data), np.asarray(want))


def test_cmyk_jpeg_is_not_inverted() -> None:
    image = Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK")
    np.testing.assert_allclose(decoded(encode(image, "JPEG", quality=100)), np.asarray(image.convert("RGB")), atol=4)


@pytest.mark.parametrize(("mode", "image_format"), [("RGBA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("LA", "PNG")])
def test_alpha_is_composited_on_white(mode: str, image_format: str) -> None:
    alpha = Image.fromarray(RAMP.astype(np.uint8))
    image = Image.new("RGB", alpha.size, (90, 90, 90)).convert(mode)
    image.putalpha(alpha)
    pixels = decoded(encode(image, image_format, **({"lossless": True} if image_format == "WEBP" else {})))
    opacity = np.asarray(alpha)[..., None] / 255
    np.testing.assert_allclose(pixels, np.broadcast_to(90 * opacity + 255 * (1 - opacity), pixels.shape), atol=1)


def test_palette_transparency_is_white() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.paste(1, (0, 0, 4, 8))
    image.paste(2, (0, 0, 4, 4))
    one_index = decoded(encode(image, "PNG", transparency=0))
    np.testing.assert_array_equal(one_index[7, 7], [255, 255, 255])
    np.testing.assert_array_equal(one_index[7, 0], [40, 50, 60])
    alpha_per_index = decoded(encode(image, "PNG", transparency=bytes([255, 0, 255])))
    np.testing.assert_array_equal(alpha_per_index[7, 7], [10, 20, 30])
    np.testing.assert_array_equal(alpha_per_index[7, 0], [255, 255, 255])
    np.testing.assert_array_equal(decoded(encode(image, "GIF", transparency=0))[7, 7], [255, 255, 255])


def test_transparent_colour_of_an_opaque_mode_is_white() -> None:
    rgb = Image.new("RGB", (8, 8), (1, 2, 3))
    rgb.paste((9, 9, 9), (0, 0, 4, 8))
    pixels = decoded(encode(rgb, "PNG", transparency=(1, 2, 3)))
    np.testing.assert_array_equal(pixels[0, [0, 7]], [[9, 9, 9], [255, 255, 255]])
    gray = Image.new("L", (8, 8), 7)
    np.testing.assert_array_equal(decoded(encode(gray, "PNG", transparency=7)), np.full((8, 8, 3), 255))
    bilevel = Image.new("1", (8, 8), 0)
    np.testing.assert_array_equal(decoded(encode(bilevel, "PNG", transparency=0)), np.full((8, 8, 3), 255))


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_is_scaled_not_clipped(image_format: str) -> None:
    image = Image.fromarray((RAMP * 257).astype(np.uint16))
    np.testing.assert_allclose(decoded(encode(image, image_format))[..., 0], RAMP, atol=0.51)


def test_dark_16_bit_image_stays_dark() -> None:
    image = Image.fromarray(np.full((8, 8), 2570, np.uint16))
    np.testing.assert_array_equal(decoded(encode(image, "PNG")), np.full((8, 8, 3), 10))


def test_transparent_16_bit_gray_is_white() -> None:
    values = np.full((8, 8), 2570, np.uint16)
    values[0, 0] = 2571
    data = encode(Image.fromarray(values), "PNG")
    body = b"tRNS" + struct.pack(">H", 2571)
    chunk = struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body))
    pixels = decoded(data[:33] + chunk + data[33:])  # 33: after the signature and IHDR
    np.testing.assert_array_equal(pixels[0, :2, 0], [255, 10])


@pytest.mark.parametrize(
    "values",
    [RAMP / 255, RAMP * 1000 - 3000, RAMP.astype(np.int32) * 1_000_000, (RAMP - 100).astype(np.int32)],
    ids=["float 0..1", "float of any range", "int beyond 16 bits", "negative int"],
)
def test_32_bit_gray_fills_the_range(values: np.ndarray) -> None:
    values = values.astype(np.float32) if values.dtype == np.float64 else values
    np.testing.assert_allclose(decoded(encode(Image.fromarray(values), "TIFF"))[..., 0], RAMP, atol=1.01)


def test_float_image_with_nan_decodes() -> None:
    values = (RAMP / 255).astype(np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    pixels = decoded(encode(Image.fromarray(values), "TIFF"))
    np.testing.assert_array_equal(pixels[0, :3], np.zeros((3, 3)))
    assert pixels[-1, -1, 0] == 255


@pytest.mark.parametrize("value", [0.0, 0.5, 7.0, -2.0])
def test_flat_float_image_decodes(value: float) -> None:
    pixels = decoded(encode(Image.fromarray(np.full((8, 8), value, np.float32)), "TIFF"))
    assert np.ptp(pixels) == 0


# --- orientation and animation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_once(orientation: int, image_format: str) -> None:
    # red top left, green top right, blue bottom left, black bottom right
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24, 0] = upright[:16, 24:, 1] = upright[16:, :24, 2] = 255
    # how a camera stores it: the inverse of what the tag asks for
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    stored = Image.fromarray(upright)
    stored.getexif()[ExifTags.Base.Orientation] = inverse
    stored = ImageOps.exif_transpose(stored)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    pixels = decoded(encode(stored, image_format, exif=exif))
    assert pixels.shape == upright.shape
    corners = (slice(8, 32, 16), slice(8, 48, 24))
    np.testing.assert_allclose(pixels[corners], upright[corners], atol=12)


def test_damaged_exif_is_ignored() -> None:
    image = noise()
    data = encode(image, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(decoded(data), np.asarray(image))


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(image_format: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encode(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(decoded(data)[8, 8], [255, 0, 0])


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "image: 0 bytes"),
        (b"hello, I am text", "not a readable"),
        (b"%PDF-1.7 ...", "not a readable"),
        (b"P6 0 0 255\n", "not a readable, non-empty"),
        (encode(noise(), "ICO"), "not a readable"),  # Pillow opens it, we do not
        (png(64, 1, bytes(193)), "64 x 1 pixels, each edge needs at least 4"),
        (png(3, 900, bytes(9000)), "3 x 900 pixels, each edge needs at least 4"),
        (png(10, 2001, bytes(62_031)), "10 x 2001 pixels, one edge is more than 200 times the other"),
        (encode(noise())[:-200], "truncated or corrupt"),
    ],
)
def test_bad_image_is_one_line_with_a_remedy(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        load_image(data)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)


def test_smallest_and_longest_images_load() -> None:
    assert load_image(encode(noise(MIN_EDGE, MIN_EDGE))).size == (MIN_EDGE, MIN_EDGE)
    assert load_image(encode(noise(MAX_ASPECT * 5, 5))).size == (MAX_ASPECT * 5, 5)


@pytest.mark.parametrize("edge", [8_001, 12_000, 30_000, 100_000])  # around Pillow's own thresholds, too
@pytest.mark.parametrize("strict_warnings", [False, True])
def test_decompression_bomb_is_refused_by_its_header(edge: int, strict_warnings: bool) -> None:
    data = png(edge, edge, b"not what the header promises")  # decoding it would say truncated
    with warnings.catch_warnings():
        if strict_warnings:
            warnings.simplefilter("error")
        with pytest.raises(ImageError, match=r"pixels.* allowed; scale it down"):
            load_image(data)


def test_limits_are_configurable() -> None:
    data = encode(noise(60, 40))
    load_image(data, ImageLimits(max_pixels=2400, max_bytes=len(data)))
    with pytest.raises(ImageError, match="60 x 40 pixels, at most 2399 in all are allowed"):
        load_image(data, ImageLimits(max_pixels=2399))
    with pytest.raises(ImageError, match=rf"{len(data)} bytes encoded, at most {len(data) - 1} are allowed"):
        load_image(data, ImageLimits(max_bytes=len(data) - 1))


@pytest.mark.parametrize("limits", [{"max_pixels": 0}, {"max_bytes": -1}, {"max_images": 2.5}, {"max_pixels": 10**10}])
def test_senseless_limits_are_config_errors(limits: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(limits))):
        ImageLimits(**limits)


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_truncated_image_is_refused(image_format: str, mode: str) -> None:
    data = encode(noise().convert(mode), image_format)
    for kept in (0.1, 0.5, 0.9):
        with pytest.raises(ImageError):
            load_image(data[: int(len(data) * kept)])


SAMPLES = {image_format: encode(noise(12, 10), image_format) for image_format in FORMATS}


@given(st.sampled_from(FORMATS), st.integers(0, 2000), st.binary(min_size=1, max_size=8))
@example("TIFF", 4, b"\xff\xff\xff\xff")
@example("GIF", 6, b"\xff\xff\xff\xff")
def test_damaged_bytes_give_an_image_or_an_image_error(image_format: str, position: int, patch: bytes) -> None:
    sample = SAMPLES[image_format]
    position %= len(sample)
    data = sample[:position] + patch + sample[position + len(patch) :]
    with contextlib.suppress(ImageError):
        assert load_image(data).mode == "RGB"


@given(st.binary(max_size=200))
def test_random_bytes_are_an_image_error(data: bytes) -> None:
    with pytest.raises(ImageError):
        load_image(data)
