"""Compares the Triton kernel of tile_resample, in Triton's interpreter, with the product's tiling by Pillow."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import interpreted
import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nvlm_trt.image.tiling import choose_grid, tile_image, tile_pixels
from nvlm_trt.plugins.tile_resample.coefficients import is_vertical_first, resize_plan

pillow_13 = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="Pillow 12 and older resize every image horizontally first"
)


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Make black and white noise in every channel, where bicubic overshoots and rounding between passes show most."""
    return np.random.default_rng(seed).integers(0, 2, (height, width, 3), np.uint8) * np.uint8(255)


def photograph(width: int, height: int) -> np.ndarray:
    """Make slopes, an edge and some noise."""
    y, x = np.mgrid[:height, :width]
    levels = 128 + 90 * np.sin(x / 17) * np.cos(y / 23) + 30 * (x + y > (width + height) / 2)
    shades = levels[..., None] * (1.0, 0.8, 0.6) + np.random.default_rng(0).normal(0, 6, (height, width, 3))
    return shades.clip(0, 255).astype(np.uint8)


def check(interpreter: ProcessPoolExecutor, image: np.ndarray, tile_size: int, max_tiles: int) -> None:
    """Assert equal 8-bit levels, and normalised values that are equal but for fp32 rounding."""
    height, width = image.shape[:2]
    expected = tile_image(Image.fromarray(image), tile_size, max_tiles)
    columns, rows = choose_grid(width, height, tile_size, max_tiles)
    tiles = interpreter.submit(interpreted.tiles, image, columns, rows, tile_size, "float32").result()
    assert tiles.shape == expected.shape
    assert np.array_equal(tile_pixels(tiles), tile_pixels(expected))
    np.testing.assert_allclose(tiles, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("width", "height", "tile_size", "max_tiles"),
    [
        (200, 130, 28, 6),  # shrunk, 3 x 2 tiles
        (640, 360, 24, 6),
        (56, 56, 28, 1),  # one tile: no thumbnail
        (28, 28, 28, 1),  # not resized
        (5, 3, 28, 6),  # enlarged
        (1, 1, 14, 2),
        (900, 30, 24, 6),  # a strip: 6 x 1 tiles, enlarged one way and shrunk the other
        (130, 70, 40, 4),  # tiles that blocks of 32 do not divide
    ],
)
def test_equals_pillow(
    interpreter: ProcessPoolExecutor, width: int, height: int, tile_size: int, max_tiles: int
) -> None:
    check(interpreter, noise(width, height), tile_size, max_tiles)


@pillow_13
@pytest.mark.parametrize(
    ("width", "height", "tile_size", "max_tiles"),
    [
        (40, 700, 20, 6),  # tiles and thumbnail vertically first
        (100, 260, 40, 6),  # 1 x 3 tiles horizontally, the thumbnail vertically first
    ],
)
def test_equals_pillow_where_the_height_goes_first(
    interpreter: ProcessPoolExecutor, width: int, height: int, tile_size: int, max_tiles: int
) -> None:
    columns, rows = choose_grid(width, height, tile_size, max_tiles)
    assert resize_plan(width, height, columns, rows, tile_size).thumbnail_vertical_first
    check(interpreter, noise(width, height), tile_size, max_tiles)


def test_equals_pillow_on_a_photograph(interpreter: ProcessPoolExecutor) -> None:
    check(interpreter, photograph(320, 200), 56, 6)


@settings(max_examples=12)
@given(width=st.integers(1, 120), height=st.integers(1, 120), tile_size=st.integers(2, 36), max_tiles=st.integers(1, 4))
def test_equals_pillow_at_any_size(
    interpreter: ProcessPoolExecutor, width: int, height: int, tile_size: int, max_tiles: int
) -> None:
    columns, rows = choose_grid(width, height, tile_size, max_tiles)
    plan = resize_plan(width, height, columns, rows, tile_size)
    if int(PIL.__version__.split(".")[0]) >= 13 or not (plan.tiles_vertical_first or plan.thumbnail_vertical_first):
        check(interpreter, noise(width, height), tile_size, max_tiles)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtypes(interpreter: ProcessPoolExecutor, dtype: str) -> None:
    image = photograph(64, 48)
    tiles = interpreter.submit(interpreted.tiles, image, 1, 1, 32, dtype).result()
    assert tiles.dtype == dtype
    np.testing.assert_allclose(tiles, tile_image(Image.fromarray(image), 32, 1), rtol=0, atol=2e-3)


@pillow_13
def test_tables_give_pillows_pixels_at_full_size() -> None:
    """The tables alone, in whole numbers, at sizes for which the interpreter is too slow."""
    for (width, height), (to_width, to_height) in (
        ((3840, 2160), (1344, 896)),
        ((3840, 2160), (448, 448)),
        ((1000, 3000), (448, 448)),  # vertically first
        ((300, 200), (1344, 896)),
    ):
        image = noise(width, height)[:, :, 0]
        plan = resize_plan(width, height, 1, 1, 448) if (to_width, to_height) == (448, 448) else None
        plan = plan or resize_plan(width, height, to_width // 448, to_height // 448, 448)
        levels = image.T if plan.tiles_vertical_first else image
        for tables, size in zip(
            plan[:2], (to_width, to_height)[:: -1 if plan.tiles_vertical_first else 1], strict=True
        ):
            levels = apply_pass(tables.bounds[:size], tables.weights[:size], levels).T
        levels = levels.T if plan.tiles_vertical_first else levels
        resized = Image.fromarray(image).resize((to_width, to_height), Image.Resampling.BICUBIC)
        assert np.array_equal(levels, np.asarray(resized))


def apply_pass(bounds: np.ndarray, weights: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Resize [n, source] to [n, entries] in whole numbers."""
    columns = [
        levels[:, begin:end].astype(np.int64) @ weight[: end - begin]
        for (begin, end), weight in zip(bounds, weights.astype(np.int64) @ (4096, 1), strict=True)
    ]
    return ((np.stack(columns, axis=1) + (1 << 21)) >> 22).clip(0, 255)


@pillow_13
@given(width=st.integers(1, 40), height=st.integers(1, 200), to_width=st.integers(1, 40), to_height=st.integers(1, 200))
def test_order_of_the_passes_is_pillows(width: int, height: int, to_width: int, to_height: int) -> None:
    image = Image.fromarray(noise(width, height)[:, :, 0])
    between = (width, to_height) if is_vertical_first(width, height, to_width, to_height) else (to_width, height)
    bicubic = Image.Resampling.BICUBIC
    two_steps = image.resize(between, bicubic).resize((to_width, to_height), bicubic)
    assert np.array_equal(np.asarray(two_steps), np.asarray(image.resize((to_width, to_height), bicubic)))


def test_sums_of_low_weights_are_exact_in_fp32() -> None:
    """Down to a 16th of the size, no partial sum reaches 2**24, for any pixels."""
    for source in [*range(56, 56 * 16 + 1, 7), 448 * 2, 448 * 5, 448 * 9 + 1, 448 * 16 - 1]:
        weights = resize_plan(source, source, 1, 1, 448 if source > 56 * 16 else 56).first_pass.weights
        low = weights[:, :, 1].astype(np.int64)
        largest = np.maximum(low.clip(0, None).sum(axis=1), -low.clip(None, 0).sum(axis=1)).max()
        assert 255 * largest < 1 << 24, source
        assert abs(weights).max() <= 2048  # whole numbers of fp16


@pytest.mark.parametrize(
    ("image", "grid", "dtype", "message"),
    [
        (torch.zeros(4, 4, dtype=torch.uint8), (1, 1), torch.float16, r"\[height, width, 3\].*got \[4, 4\] uint8"),
        (torch.zeros(4, 4, 4, dtype=torch.uint8), (1, 1), torch.float16, r"\[height, width, 3\]"),
        (torch.zeros(4, 4, 3), (1, 1), torch.float16, "uint8.*got .* float32"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8).permute(1, 2, 0), (1, 1), torch.float16, "contiguous"),
        (torch.zeros(0, 4, 3, dtype=torch.uint8), (1, 1), torch.float16, "4x0 pixels"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), (0, 1), torch.float16, "0x1 tiles"),
        (torch.zeros(1, 1, 3, dtype=torch.uint8).expand(30000, 30000, 3), (1, 1), torch.float16, "contiguous"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), (1, 1), torch.float64, "not torch.float64"),
    ],
)
def test_refuses_what_does_not_fit(
    image: torch.Tensor, grid: tuple[int, int], dtype: torch.dtype, message: str
) -> None:
    pytest.importorskip("triton")
    from nvlm_trt.plugins.tile_resample.launcher import tile_resample

    with pytest.raises(ValueError, match=message):
        tile_resample(image, *grid, 28, dtype)
