"""Computes Pillow's bicubic filter as fixed-point tables: the source pixels of each resized pixel, and their weights.

Source: `precompute_coeffs` and `normalize_coeffs_8bpc` in Pillow's src/libImaging/Resample.c (a = -0.5, the support
stretched by the ratio when shrinking, weights rounded to 22 fractional bits).
"""

from __future__ import annotations

import functools
import typing

import numpy as np
import numpy.typing as npt

WEIGHT_BITS = 22
_SUPPORT = 2.0


class PassTables(typing.NamedTuple):
    """Holds the tables of one pass: an entry per resized pixel along the axis, for tiles, then for the thumbnail.

    The tables are read-only, because calls share them."""

    bounds: npt.NDArray[np.int32]  # [entries, 2]: the first source pixel, and the pixel after the last
    # [entries, taps, 2]: (high, low), whole numbers that fp16 holds (at most 2048): the weight is 4096 high + low in
    # units of 1 / 2**22. Entries after the last source pixel are 0.
    weights: npt.NDArray[np.float16]


class BlockTables(typing.NamedTuple):
    """Holds a pass as matrix products: resized pixels in blocks along the axis. No block spans two tiles."""

    spans: npt.NDArray[np.int32]  # [blocks, 2]: a block's first source pixel, and the pixel after the last
    # [blocks, sources, 2, block]: (high, low) of `PassTables.weights` for each source pixel from the span's first on
    weights: npt.NDArray[np.float16]


class ResizePlan(typing.NamedTuple):
    """Holds the tables that resize an image to the tiles' canvas and to the thumbnail. "Vertical first" is 0 or 1."""

    first_pass: PassTables
    second_pass: PassTables
    tiles_vertical_first: int
    thumbnail_vertical_first: int


@functools.lru_cache(maxsize=64)  # many images have the same size: pages, frames
def resize_plan(width: int, height: int, columns: int, rows: int, tile_size: int) -> ResizePlan:
    """Compute the tables from an image of width * height to columns * rows tiles and a thumbnail, all of tile_size."""
    passes: tuple[list[PassTables], list[PassTables]] = ([], [])
    vertical_first = []
    for to_width, to_height in ((columns * tile_size, rows * tile_size), (tile_size, tile_size)):
        horizontal, vertical = _axis_tables(width, to_width), _axis_tables(height, to_height)
        order = is_vertical_first(width, height, to_width, to_height)
        for tables, axis in zip(passes, (vertical, horizontal) if order else (horizontal, vertical), strict=True):
            tables.append(axis)
        vertical_first.append(int(order))
    first, second = (_concatenate(tables) for tables in passes)
    return ResizePlan(first, second, *vertical_first)


def is_vertical_first(width: int, height: int, to_width: int, to_height: int) -> bool:
    """Tell whether Pillow 13 resizes vertically first, for speed: where the height shrinks much more than the width.

    Pillow 12 always resizes horizontally first. The order changes pixels, because Pillow rounds and clips values
    between the passes."""
    return height - to_height > 2 * max(width - to_width, 0)


def block_tables(tables: PassTables, tile_size: int, block: int, step: int, align: int) -> BlockTables:
    """Group a pass's resized pixels into blocks of `block`; a tile's last block may have fewer pixels.

    Spans begin at multiples of `align`. Each block has weights, 0 outside its span, for `sources` pixels, a multiple of
    `step`."""
    per_tile = -(-tile_size // block)
    entry = np.arange(len(tables.bounds))
    of_block = entry // tile_size * per_tile + entry % tile_size // block  # [entries]
    begins = np.flatnonzero(np.diff(of_block, prepend=-1))  # each block's first entry
    low = np.minimum.reduceat(tables.bounds[:, 0], begins) // align * align
    high = np.maximum.reduceat(tables.bounds[:, 1], begins)
    sources = -(-int((high - low).max()) // step) * step
    weights = np.zeros((len(begins), sources, 2, block), np.float16)
    offset = tables.bounds[:, 0] - low[of_block]
    for tap in range(tables.weights.shape[1]):
        used = tables.bounds[:, 0] + tap < tables.bounds[:, 1]
        place = entry[used] % tile_size % block
        weights[of_block[used], offset[used] + tap, :, place] = tables.weights[used, tap]
    return BlockTables(np.stack([low, high], axis=1).astype(np.int32), weights)


def _axis_tables(source: int, size: int) -> PassTables:
    """Compute the entries that resize a line of `source` pixels to `size`."""
    ratio = source / size
    stretch = max(ratio, 1.0)
    support = _SUPPORT * stretch
    center = (np.arange(size) + 0.5) * ratio
    begin = np.maximum((center - support + 0.5).astype(np.int32), 0)  # C's conversion: towards zero
    end = np.minimum((center + support + 0.5).astype(np.int32), source)
    position = begin[:, None] + np.arange((end - begin).max())  # [size, taps]
    weights = _bicubic((position - center[:, None] + 0.5) * (1.0 / stretch))
    weights[position >= end[:, None]] = 0.0
    weights /= weights.cumsum(axis=1)[:, -1:]  # a sum in Pillow's order: the last bit can decide between two levels
    scaled = weights * (1 << WEIGHT_BITS)
    fixed = (scaled + np.copysign(0.5, scaled)).astype(np.int32)
    low = (fixed + 2048) % 4096 - 2048
    return PassTables(np.stack([begin, end], axis=1), np.stack([(fixed - low) >> 12, low], axis=2).astype(np.float16))


def _bicubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    a = -0.5
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _concatenate(tables: list[PassTables]) -> PassTables:
    taps = max(table.weights.shape[1] for table in tables)
    bounds = np.concatenate([table.bounds for table in tables])
    weights = np.concatenate(
        [np.pad(table.weights, ((0, 0), (0, taps - table.weights.shape[1]), (0, 0))) for table in tables]
    )
    bounds.flags.writeable = weights.flags.writeable = False
    return PassTables(bounds, weights)
