"""Tests grids, tiles and image keys against transformers' GotOcr2 processor, which follows the same InternVL rule."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import GotOcr2ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from nvlm_trt.errors import RequestError
from nvlm_trt.image.tiling import choose_grid, image_key, tile_count, tile_image
from nvlm_trt.reference.preprocess import reference_grid, reference_tiles

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

# from NVLM-1.0, arXiv 2409.11402: the grids of at most 6 tiles, columns : rows
PAPER_GRIDS = "1:1 1:2 1:3 1:4 1:5 1:6 2:1 2:2 2:3 3:1 3:2 4:1 5:1 6:1"

sizes = st.integers(4, 8000)
tile_limits = st.integers(1, 12)


@pytest.fixture
def photo() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (70, 100, 3), dtype=np.uint8)).resize((500, 300))


def transformers_tiles(image: Image.Image, tile_size: int, max_tiles: int) -> np.ndarray:
    processor = GotOcr2ImageProcessorPil(
        size={"height": tile_size, "width": tile_size},
        crop_to_patches=True,
        max_patches=max_tiles,
        image_mean=MEAN,
        image_std=STD,
    )
    return processor(image, return_tensors="np")["pixel_values"]


@given(sizes, sizes, st.sampled_from([56, 112, 448]), tile_limits)
def test_grid_is_that_of_transformers(width: int, height: int, tile_size: int, max_tiles: int) -> None:
    want = get_optimal_tiled_canvas((height, width), (tile_size, tile_size), 1, max_tiles)
    assert choose_grid(width, height, tile_size, max_tiles) == want


@pytest.mark.parametrize("grid", [choose_grid, reference_grid])
@pytest.mark.parametrize("max_tiles", range(1, 13))
def test_ties_are_those_of_transformers(max_tiles: int, grid: Callable[[int, int, int, int], tuple[int, int]]) -> None:
    """Images with the shape of a grid or half way between two grids; random sizes seldom have such a shape."""
    sides = range(1, max_tiles + 1)
    ratios = sorted({Fraction(i, j) for i, j in itertools.product(sides, sides) if i * j <= max_tiles})
    half_way = [(low + high) / 2 for low, high in itertools.pairwise(ratios)]
    for aspect, scale in itertools.product(ratios + half_way, range(1, 60)):
        width, height = aspect.numerator * scale, aspect.denominator * scale
        want = get_optimal_tiled_canvas((height, width), (56, 56), 1, max_tiles)
        assert grid(width, height, 56, max_tiles) == want, (width, height)


@given(sizes, sizes, tile_limits)
def test_grid_stays_within_the_limit(width: int, height: int, max_tiles: int) -> None:
    columns, rows = choose_grid(width, height, 448, max_tiles)
    assert columns >= 1
    assert rows >= 1
    assert columns * rows <= max_tiles


def test_the_papers_grids_are_all_reachable_and_no_others() -> None:
    wanted = {tuple(map(int, grid.split(":"))) for grid in PAPER_GRIDS.split()}
    reached = {choose_grid(i * 448, j * 448, 448, 6) for i, j in itertools.product(range(1, 7), repeat=2)}
    assert reached == wanted


def test_tie_takes_the_larger_grid_only_for_a_large_image() -> None:
    # 1:1 and 2:2 are equally near; 2:2 wins above half its area, 0.5 * 896 * 896 = 401,408 = 633.57 squared
    assert choose_grid(633, 633, 448, 6) == (1, 1)
    assert choose_grid(634, 634, 448, 6) == (2, 2)
    # 3:2 is as far from 1:1 as from 2:1, whose half area is 0.5 * 896 * 448 = 200,704
    assert choose_grid(540, 360, 448, 2) == (1, 1)
    assert choose_grid(600, 400, 448, 2) == (2, 1)


@pytest.mark.parametrize("max_tiles", range(1, 65))
def test_grids_of_equal_area_never_tie_for_the_nearest(max_tiles: int) -> None:
    """So the order within an area, which InternVL leaves to a Python set, cannot change the choice."""
    sides = range(1, max_tiles + 1)
    areas: dict[Fraction, set[int]] = {}
    for columns, rows in itertools.product(sides, sides):
        if columns * rows <= max_tiles:
            areas.setdefault(Fraction(columns, rows), set()).add(columns * rows)
    # only neighbouring ratios can be equally near an aspect with none nearer
    for low, high in itertools.pairwise(sorted(areas)):
        assert not areas[low] & areas[high]


@pytest.mark.parametrize(("size", "max_tiles"), [((500, 300), 6), ((90, 400), 6), ((300, 300), 12), ((60, 50), 1)])
def test_tiles_are_those_of_transformers(photo: Image.Image, size: tuple[int, int], max_tiles: int) -> None:
    image = photo.resize(size)
    want = transformers_tiles(image, 56, max_tiles)
    for tiles in (tile_image(image, 56, max_tiles), reference_tiles(image, 56, max_tiles).numpy()):
        assert tiles.shape == want.shape
        assert np.isfinite(tiles).all()
        np.testing.assert_allclose(tiles, want, atol=2e-6, rtol=0)


def test_tiles_are_contiguous_float32(photo: Image.Image) -> None:
    tiles = tile_image(photo, 56, 6)
    assert tiles.dtype == np.float32
    assert tiles.flags.c_contiguous


def test_tiles_go_row_by_row_and_the_thumbnail_is_last() -> None:
    # a 3 x 2 image of flat colours, each exactly one tile
    colours = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    image = Image.fromarray(np.kron(colours, np.ones((112, 112), np.uint8))).convert("RGB")
    tiles = tile_image(image, 112, 6)
    assert tiles.shape == (7, 3, 112, 112)
    centre = tiles[:, 0, 56, 56] * STD[0] + MEAN[0]
    np.testing.assert_allclose(centre[:6] * 255, colours.ravel(), atol=1e-3)
    thumbnail = tiles[6, 0] * STD[0] + MEAN[0]
    np.testing.assert_allclose(thumbnail[28, [10, 56, 100]] * 255, colours[0], atol=2)


def test_channels_are_normalised_with_imagenets_statistics() -> None:
    image = Image.new("RGB", (20, 20), (255, 0, 51))
    pixels = tile_image(image, 56, 1)[0, :, 0, 0]
    np.testing.assert_allclose(pixels, [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225], rtol=1e-6)


def test_one_tile_image_has_no_extra_thumbnail(photo: Image.Image) -> None:
    assert tile_image(photo, 56, 1).shape == (1, 3, 56, 56)
    assert tile_count(500, 300, 56, 1) == 1


@given(st.integers(4, 200), st.integers(4, 200), st.integers(1, 6))
def test_tile_count_is_what_tile_image_returns(width: int, height: int, max_tiles: int) -> None:
    assert tile_image(Image.new("RGB", (width, height)), 8, max_tiles).shape[0] == tile_count(
        width, height, 8, max_tiles
    )


@pytest.mark.parametrize("max_tiles", [0, -3])
def test_max_tiles_below_one_is_a_request_error(max_tiles: int) -> None:
    with pytest.raises(RequestError, match=f"max_tiles {max_tiles} must be at least 1"):
        choose_grid(100, 100, 448, max_tiles)


def test_key_depends_on_every_field_and_only_on_them() -> None:
    keys = {
        image_key(data, tile_size, max_tiles, digest)
        for data in (b"a", b"ab")
        for tile_size in (1, 11, 448)
        for max_tiles in (1, 11, 6)
        for digest in ("", "a", "1", "1:a")
    }
    assert len(keys) == 2 * 3 * 3 * 4
    assert image_key(b"a", 448, 6, "d") == image_key(b"a", 448, 6, "d")


@given(*(st.tuples(st.binary(max_size=6), st.integers(1, 99), st.integers(1, 99), st.text("1:a", max_size=4)),) * 2)
def test_keys_are_equal_only_for_equal_fields(
    first: tuple[bytes, int, int, str], second: tuple[bytes, int, int, str]
) -> None:
    assert (image_key(*first) == image_key(*second)) == (first == second)


@pytest.mark.parametrize("max_tiles", [0, -1, 65, 10**6, 10**30])
def test_a_number_of_tiles_that_cannot_be(max_tiles: int) -> None:
    with pytest.raises(RequestError, match=f"max_tiles {max_tiles} .* at most 64"):
        choose_grid(100, 100, 448, max_tiles)


def test_the_most_tiles_take_no_time() -> None:
    started = time.perf_counter()
    for width in range(1000, 2000, 10):
        choose_grid(width, 1000, 448, 64)
    assert time.perf_counter() - started < 1
