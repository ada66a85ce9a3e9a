"""Image -> grid -> tiles, by InternVL's dynamic tiling rule, which NVLM-1.0 adopts (arXiv 2409.11402, section 4.2).

Source of the rule: `find_closest_aspect_ratio` and `dynamic_preprocess` in OpenGVLab/InternVL
(internvl_chat/internvl/train/dataset.py), whose Python set leaves grids of equal area in no stated order. The order
does not matter: grids of one area never tie for the nearest ratio (tests/image/test_tiling.py checks up to 64 tiles).
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import numpy.typing as npt
from PIL import Image

from nvlm_trt.bounds import MAX_TILES
from nvlm_trt.errors import RequestError

# ImageNet statistics of RGB in 0..1
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)


def choose_grid(width: int, height: int, tile_size: int, max_tiles: int) -> tuple[int, int]:
    """Returns (columns, rows) with columns / rows nearest to width / height and columns * rows <= max_tiles.

    The larger of two grids that are equally near in float64 wins if its area is less than twice the image's.
    """
    aspect = width / height
    best, best_distance = (1, 1), float("inf")
    for columns, rows in _candidate_grids(max_tiles):
        distance = abs(aspect - columns / rows)
        if distance < best_distance:
            best, best_distance = (columns, rows), distance
        elif distance == best_distance and width * height > 0.5 * tile_size * tile_size * columns * rows:
            best = (columns, rows)
    return best


def tile_count(width: int, height: int, tile_size: int, max_tiles: int) -> int:
    """Counts the tiles of an image of this size, thumbnail included: `tile_image(...).shape[0]`."""
    columns, rows = choose_grid(width, height, tile_size, max_tiles)
    return columns * rows + (columns * rows > 1)


def tile_image(image: Image.Image, tile_size: int, max_tiles: int) -> npt.NDArray[np.float32]:
    """RGB image -> normalised pixels [tiles, 3, tile_size, tile_size], row by row, then the thumbnail."""
    return normalise_tiles(cut_tiles(image, tile_size, max_tiles))


def cut_tiles(image: Image.Image, tile_size: int, max_tiles: int) -> npt.NDArray[np.uint8]:
    """RGB image -> pixels [tiles, 3, tile_size, tile_size], row by row, then the thumbnail.

    Stretches the image over the grid with Pillow's antialiased bicubic. A single tile is its own thumbnail.
    """
    assert image.mode == "RGB", image.mode
    columns, rows = choose_grid(image.width, image.height, tile_size, max_tiles)
    regular = columns * rows
    tiles = np.empty((regular + (regular > 1), 3, tile_size, tile_size), np.uint8)

    # [rows, E, columns, E, 3] -> [rows, columns, 3, E, E]
    canvas = _resize(image, columns * tile_size, rows * tile_size).reshape(rows, tile_size, columns, tile_size, 3)
    tiles[:regular].reshape(rows, columns, 3, tile_size, tile_size)[...] = canvas.transpose(0, 2, 4, 1, 3)
    if regular > 1:
        tiles[-1] = _resize(image, tile_size, tile_size).transpose(2, 0, 1)  # [E, E, 3] -> [3, E, E]
    return tiles


def normalise_tiles(tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """RGB tiles [tiles, 3, E, E] of `cut_tiles` -> the pixels that the vision encoder takes."""
    pixels = tiles.astype(np.float32)
    pixels /= 255
    pixels -= _MEAN[:, None, None]
    pixels /= _STD[:, None, None]
    return pixels


def tile_pixels(tiles: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Inverts the normalisation of `tile_image` exactly: [tiles, 3, E, E] -> RGB [tiles, E, E, 3]."""
    pixels = tiles * _STD[:, None, None]
    pixels += _MEAN[:, None, None]
    pixels *= 255
    return np.rint(pixels, out=pixels).astype(np.uint8).transpose(0, 2, 3, 1)


def image_key(data: bytes, tile_size: int, max_tiles: int, engine_digest: str) -> str:
    """Hashes all that an image's tokens depend on: encoded bytes (which hold mode and size), tiling and weights."""
    digest = hashlib.sha256()
    for field in (b"%d" % tile_size, b"%d" % max_tiles, engine_digest.encode(), data):
        digest.update(b"%d:" % len(field))  # a length before each field: no two field lists give the same bytes
        digest.update(field)
    return digest.hexdigest()


@functools.lru_cache(maxsize=64)
def _candidate_grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
    if not 1 <= max_tiles <= MAX_TILES:
        raise RequestError(f"max_tiles {max_tiles} must be at least 1 and at most {MAX_TILES}; NVLM-1.0 has 6")
    grids = ((columns, rows) for columns in range(1, max_tiles + 1) for rows in range(1, max_tiles // columns + 1))
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def _resize(image: Image.Image, width: int, height: int) -> npt.NDArray[np.uint8]:
    """-> [height, width, 3]"""
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
