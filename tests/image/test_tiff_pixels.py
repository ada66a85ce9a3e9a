"""Tests gray values of all sample types, inverted ones, no data, and separate planes, in TIFF files written here."""

from __future__ import annotations

import contextlib
import io
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from tiff_writer import write_tiff

from nvlm_trt.errors import ImageError
from nvlm_trt.image.decoding import load_image

# installed by nvlm_trt.image for the process, which pytest's own filters hide
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

RAMP = np.linspace(0, 255, 64 * 32).reshape(32, 64)  # [height, width], black to white
LARGEST = float(np.finfo(np.float32).max)


def decoded(data: bytes) -> np.ndarray:
    """-> [height, width] of a gray image; no warning is allowed"""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = np.asarray(load_image(data)).astype(float)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("big", [False, True], ids=["classic", "BigTIFF"])
@pytest.mark.parametrize("photometric", [0, 1], ids=["WhiteIsZero", "BlackIsZero"])
@pytest.mark.parametrize(
    ("values", "order"),
    [
        (RAMP.astype(np.uint8), "<"),
        ((RAMP - 128).astype(np.int8), "<"),
        ((RAMP - 128).astype(np.int8), ">"),
        ((RAMP * 257).astype(np.uint16), "<"),
        ((RAMP * 257).astype(np.uint16), ">"),
        ((RAMP * 257 - 32768).astype(np.int16), "<"),
        ((RAMP * 257 - 32768).astype(np.int16), ">"),
        ((RAMP * (2**32 - 1) / 255).astype(np.uint32), "<"),
        ((RAMP * (2**32 - 1) / 255 - 2**31).astype(np.int32), "<"),
        ((RAMP * (2**32 - 1) / 255 - 2**31).astype(np.int32), ">"),
        ((RAMP / 255).astype(np.float32), "<"),
        ((RAMP / 255).astype(np.float32), ">"),
        ((RAMP * 1000 - 7).astype(np.float32), "<"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.dtype.name,
)
def test_gray_of_every_type(values: np.ndarray, order: str, photometric: int, big: bool) -> None:
    data = write_tiff(values, order=order, photometric=photometric, big=big)
    if big and order == ">":
        with pytest.raises(ImageError, match="a big-endian BigTIFF, not a readable format"):
            load_image(data)
        return
    pixels = decoded(data)
    np.testing.assert_allclose(pixels, RAMP if photometric else 255 - RAMP, atol=1.01)


@pytest.mark.parametrize("photometric", [0, 1])
def test_12_bit_gray_fills_the_range(photometric: int) -> None:
    values = np.rint(RAMP * 4095 / 255).astype(int)
    packed = "".join(f"{value:012b}" for value in values.reshape(-1))
    strip = int(packed, 2).to_bytes(len(packed) // 8, "big")
    data = write_tiff(values.astype(np.uint16), bits=12, data=[strip], photometric=photometric)
    np.testing.assert_allclose(decoded(data), RAMP if photometric else 255 - RAMP, atol=1.01)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("photometric", [0, 1])
def test_gray_in_a_plane_of_its_own(dtype: type, photometric: int) -> None:
    scale = {np.uint8: 1, np.uint16: 257, np.float32: 1 / 255}[dtype]
    data = write_tiff((RAMP * scale).astype(dtype), planar=2, photometric=photometric)
    np.testing.assert_allclose(decoded(data), RAMP if photometric else 255 - RAMP, atol=1.01)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("samples", [3, 4])
def test_colours_in_one_plane_or_several(order: str, planar: int, dtype: type, samples: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, np.iinfo(dtype).max, (10, 12, samples), dtype=dtype)
    tags = {338: [2]} if samples == 4 else {}
    pixels = np.asarray(load_image(write_tiff(values, order=order, planar=planar, photometric=2, tags=tags))).astype(
        float
    )
    scaled = values / np.iinfo(dtype).max * 255
    alpha = scaled[..., 3:] / 255 if samples == 4 else 1.0
    np.testing.assert_allclose(pixels, scaled[..., :3] * alpha + 255 * (1 - alpha), atol=2)


# --- floats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("span", [LARGEST, 3.4e38, 1e30, 1e-30, 1e-44])
def test_huge_and_tiny_floats_fill_the_range(span: float, photometric: int) -> None:
    values = np.float32([[-span, 0, span, -span]] * 4)
    pixels = decoded(write_tiff(values, photometric=photometric))
    want = np.array([0, 128, 255, 0])
    np.testing.assert_allclose(pixels[0], want if photometric else 255 - want, atol=1)


def test_no_data_is_black_and_does_not_count() -> None:
    values = np.float32([[np.nan, np.inf, -np.inf, -20], [-20, -15, -10, -10]] * 2)
    np.testing.assert_array_equal(decoded(write_tiff(values))[:2], [[0, 0, 0, 0], [0, 128, 255, 255]])
    inverted = decoded(write_tiff(values, photometric=0))
    np.testing.assert_array_equal(inverted[:2], [[0, 0, 0, 255], [255, 128, 0, 0]])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, LARGEST, -LARGEST])
def test_float_image_without_a_range_is_black(value: float) -> None:
    np.testing.assert_array_equal(decoded(write_tiff(np.full((4, 4), value, np.float32))), np.zeros((4, 4)))


@given(arrays.arrays(np.float32, (5, 6), elements=st.floats(width=32)))
def test_any_floats_decode_in_order(values: np.ndarray) -> None:
    pixels = decoded(write_tiff(values))
    finite = np.isfinite(values)
    assert (pixels[~finite] == 0).all()
    ordered = pixels[finite][np.argsort(values[finite], kind="stable")]
    assert (np.diff(ordered) >= 0).all()


# --- damage ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 3000), st.binary(min_size=1, max_size=8), st.sampled_from([(np.uint16, 0), (np.uint8, 2)]))
def test_damaged_tags_give_an_image_or_an_image_error(at: int, patch: bytes, kind: tuple[type, int]) -> None:
    data = write_tiff(np.zeros((8, 8), kind[0]), photometric=0, planar=max(1, kind[1]))
    at %= len(data)
    with contextlib.suppress(ImageError):
        assert load_image(data[:at] + patch + data[at + len(patch) :]).mode == "RGB"


def test_orientation_is_applied_once_to_deep_gray() -> None:
    values = (RAMP * 257).astype(np.uint16)
    data = write_tiff(values, photometric=0, tags={274: [6]})
    np.testing.assert_allclose(decoded(data), np.rot90(255 - RAMP, -1), atol=1.01)
    with Image.open(io.BytesIO(write_tiff(values, tags={274: [6]}))) as image:
        assert image.size == (32, 64)  # Pillow's, which the code relies on
