"""The GPU kernel of tile_resample: Pillow's two-pass bicubic, the cut into tiles and the normalisation in one go.

A pass is a product with a banded matrix of a few weights per row, and tensor cores do dense products faster than the
other units gather pixels. They do it exactly: a weight is 4096 high + low with -2048 <= low < 2048; both and the pixels
are whole numbers that fp16 holds, and the sums stay below 2**24, which fp32 holds (in pictures up to 16 times as wide
and high as what they become; beyond, the last of 22 fractional bits may be lost). Between the passes values are rounded
to 8 bits and clipped, as Pillow does, so the pixels are Pillow's own.

Bytes: 3840 x 2160 in is 24.9 MB, read once for the tiles and once for the thumbnail (that may come from L2, half of
which it fills); 6 + 1 tiles of 448 in bf16 out are 8.4 MB: 33 to 58 MB, 7 to 12 us at 4.8 TB/s. What remains is
instructions: programs read a margin of two output pixels on each side, and blocks do not divide evenly, so that 23,000
steps of 64 x 64 source pixels are made of it, 8 warps and at most 600 instructions (counted in the PTX) each. At two or
three per cycle on each of 132 multiprocessors that is 100 to 200 us. An estimate; not measured yet.
"""

# ruff: noqa: N803, compile-time arguments are in capitals, as in all Triton code
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_resample_kernel(
    image,  # [height, width, 3] uint8
    first_bounds,  # [entries, 2] int32, see coefficients.py
    first_weights,  # [entries, first_taps, 2] fp16
    second_bounds,
    second_weights,
    width,
    columns,
    rows,
    tiles_vertical_first,
    thumbnail_vertical_first,
    first_taps,
    second_taps,
    tiles,  # [columns * rows and perhaps one more, 3, TILE, TILE]
    MEAN_R: tl.constexpr,
    MEAN_G: tl.constexpr,
    MEAN_B: tl.constexpr,
    STD_R: tl.constexpr,
    STD_G: tl.constexpr,
    STD_B: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,  # output pixels per side of a program's square
    SOURCE: tl.constexpr,  # source pixels per side of a step
):
    """Grid: (3, ceil(TILE / BLOCK) ** 2, tiles). All tensors contiguous; offsets into `image` must fit 31 bits.

    u is the axis of the first pass, v that of the second."""
    channel = tl.program_id(0)
    blocks: tl.constexpr = (TILE + BLOCK - 1) // BLOCK
    u = tl.program_id(1) % blocks * BLOCK + tl.arange(0, BLOCK)
    v = tl.program_id(1) // blocks * BLOCK + tl.arange(0, BLOCK)
    tile = tl.program_id(2)
    is_thumbnail = tile == columns * rows
    vertical_first = tl.where(is_thumbnail, thumbnail_vertical_first, tiles_vertical_first) != 0
    # Which tile along each axis; the thumbnail's entries follow those of the last.
    column = tl.where(is_thumbnail, columns, tile % columns)
    row = tl.where(is_thumbnail, rows, tile // columns)
    u_entry = tl.where(tiles_vertical_first != 0, row, column) * TILE + u
    v_entry = tl.where(tiles_vertical_first != 0, column, row) * TILE + v
    u_begin = tl.load(first_bounds + u_entry * 2, mask=u < TILE, other=0)
    u_end = tl.load(first_bounds + u_entry * 2 + 1, mask=u < TILE, other=0)
    v_begin = tl.load(second_bounds + v_entry * 2, mask=v < TILE, other=0)
    v_end = tl.load(second_bounds + v_entry * 2 + 1, mask=v < TILE, other=0)
    u_low, u_high = _hull(u_begin, u_end)
    v_low, v_high = _hull(v_begin, v_end)
    u_stride = tl.where(vertical_first, width * 3, 3)
    v_stride = tl.where(vertical_first, 3, width * 3)

    coarse = tl.zeros([BLOCK, BLOCK], tl.float32)  # [v, u]: sums of high weights; `fine` of low ones
    fine = tl.zeros([BLOCK, BLOCK], tl.float32)
    for v_step in range(v_low, v_high, SOURCE):
        v_source = v_step + tl.arange(0, SOURCE)
        first_coarse = tl.zeros([SOURCE, BLOCK], tl.float32)  # [v_source, u]
        first_fine = tl.zeros([SOURCE, BLOCK], tl.float32)
        for u_step in range(u_low, u_high, SOURCE):
            u_source = u_step + tl.arange(0, SOURCE)
            pixels = tl.load(
                image + (v_source * v_stride)[:, None] + (u_source * u_stride)[None, :] + channel,
                mask=(v_source < v_high)[:, None] & (u_source < u_high)[None, :],
                other=0,
            ).to(tl.float16)  # [v_source, u_source]
            high, low = _weights(first_weights, u_entry, u_begin, u_end, first_taps, u_source)  # [u, u_source]
            first_coarse += tl.dot(pixels, tl.trans(high))
            first_fine += tl.dot(pixels, tl.trans(low))
        levels = _round(first_coarse, first_fine).to(tl.float16)
        high, low = _weights(second_weights, v_entry, v_begin, v_end, second_taps, v_source)  # [v, v_source]
        coarse += tl.dot(high, levels)
        fine += tl.dot(low, levels)

    mean = tl.where(channel == 0, MEAN_R, tl.where(channel == 1, MEAN_G, MEAN_B))
    std = tl.where(channel == 0, STD_R, tl.where(channel == 1, STD_G, STD_B))
    result = (_round(coarse, fine).to(tl.float32) / 255.0 - mean) / std
    u_out = u * tl.where(vertical_first, TILE, 1)
    v_out = v * tl.where(vertical_first, 1, TILE)
    at = (tile * 3 + channel) * TILE * TILE + v_out[:, None] + u_out[None, :]
    tl.store(tiles + at, result.to(tiles.dtype.element_ty), mask=(v < TILE)[:, None] & (u < TILE)[None, :])


@triton.jit
def _hull(begin, end):
    """Of ranges, of which some are (0, 0) for pixels outside the tile."""
    return tl.min(tl.where(begin < end, begin, 2147483647)), tl.max(end)


@triton.jit
def _weights(table, entry, begin, end, taps, source):
    """Weights of `source` pixels for the entries, mostly zeros: (high, low), each [entries, sources] fp16."""
    inside = (source[None, :] >= begin[:, None]) & (source[None, :] < end[:, None])
    at = table + (entry[:, None] * taps + source[None, :] - begin[:, None]) * 2
    return tl.load(at, mask=inside, other=0.0), tl.load(at + 1, mask=inside, other=0.0)


@triton.jit
def _round(coarse, fine):
    """Sums of weighted pixels to levels 0..255, as Pillow's clip8 does: int32."""
    level = ((coarse.to(tl.int32) << 12) + fine.to(tl.int32) + (1 << 21)) >> 22
    return tl.minimum(tl.maximum(level, 0), 255)
