"""The GPU kernels of tile_resample: Pillow's two-pass bicubic, the cut into tiles and the normalisation in one kernel.

A pass is a product with a banded matrix of a few weights per row, and tensor cores compute dense products faster than
other units gather pixels. The products are exact: a weight is 4096 high + low with -2048 <= low < 2048; high, low and
pixels are whole numbers that fp16 holds, and the sums stay below 2**24, which fp32 holds (for images up to 16 times as
wide and high as the result; beyond, the last of 22 fractional bits may be lost). Between the passes, the kernel rounds
values to 8 bits and clips them, as Pillow does, so the pixels are Pillow's own.

A first kernel separates the image's channels: bytes three apart are loaded one by one, bytes side by side 16 at a
time. docs/plugins.md has the times.
"""

# ruff: noqa: N803, compile-time arguments are in capitals, as in all Triton code
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def planes_kernel(
    image,  # [height, width, 3] uint8, the first 4-byte aligned
    width,
    words,  # words of four bytes in the image; the last word may be incomplete
    pitch,  # bytes per row of a plane, a multiple of 16
    plane,  # bytes per plane
    planes,  # [3, height, pitch] uint8
    QUADS: tl.constexpr,  # groups of four pixels per program
):
    """Grid: (height, ceil(pitch / 4 / QUADS)). The bytes between the image's width and the pitch are arbitrary."""
    row = tl.program_id(0).to(tl.int64)
    quad = tl.program_id(1) * QUADS + tl.arange(0, QUADS)
    begin = row * width * 3
    at = begin // 4 + 3 * quad  # the word that holds the quad's first byte
    shift = (begin % 4 * 8).to(tl.uint64)
    source = image.to(tl.pointer_type(tl.uint32))
    w0 = tl.load(source + at, mask=at < words, other=0).to(tl.uint64)
    w1 = tl.load(source + at + 1, mask=at + 1 < words, other=0).to(tl.uint64)
    w2 = tl.load(source + at + 2, mask=at + 2 < words, other=0).to(tl.uint64)
    w3 = tl.load(source + at + 3, mask=at + 3 < words, other=0).to(tl.uint64)
    a = (w0 | (w1 << 32)) >> shift  # r g b r, the lowest byte first
    b = (w1 | (w2 << 32)) >> shift  # g b r g
    c = (w2 | (w3 << 32)) >> shift  # b r g b
    red = _byte(a, 0) | (_byte(a, 3) << 8) | (_byte(b, 2) << 16) | (_byte(c, 1) << 24)
    green = _byte(a, 1) | (_byte(b, 0) << 8) | (_byte(b, 3) << 16) | (_byte(c, 2) << 24)
    blue = _byte(a, 2) | (_byte(b, 1) << 8) | (_byte(c, 0) << 16) | (_byte(c, 3) << 24)
    target = (planes + row * pitch).to(tl.pointer_type(tl.uint32)) + quad
    in_row = quad * 4 < pitch
    tl.store(target, red.to(tl.uint32), mask=in_row)
    tl.store(target + plane // 4, green.to(tl.uint32), mask=in_row)
    tl.store(target + plane // 4 * 2, blue.to(tl.uint32), mask=in_row)


@triton.jit
def _byte(word, number: tl.constexpr):
    return (word >> (number * 8)) & 0xFF


@triton.jit
def tile_resample_kernel(
    planes,  # [3, height, pitch] uint8, and at least SOURCE bytes more
    first_spans,  # [blocks, 2] int32, see coefficients.py
    first_weights,  # [blocks, first_sources, 2, BLOCK] fp16
    second_spans,
    second_weights,
    first_sources,
    second_sources,
    pitch,
    plane,  # bytes per plane
    columns,
    rows,
    tiles_vertical_first,
    thumbnail_vertical_first,
    tiles,  # [columns * rows, plus one for a thumbnail, 3, TILE, TILE]
    MEAN_R: tl.constexpr,
    MEAN_G: tl.constexpr,
    MEAN_B: tl.constexpr,
    STD_R: tl.constexpr,
    STD_G: tl.constexpr,
    STD_B: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,  # output pixels per side of a program's square
    SOURCE: tl.constexpr,  # source pixels per side of a step
    ALIGN: tl.constexpr,  # spans begin at multiples of ALIGN
):
    """Grid: (3, ceil(TILE / BLOCK) ** 2, tiles). All tensors contiguous; offsets into a plane must fit 31 bits.

    u is the axis of the first pass, v the axis of the second."""
    channel = tl.program_id(0)
    blocks: tl.constexpr = (TILE + BLOCK - 1) // BLOCK
    u_block = tl.program_id(1) % blocks
    v_block = tl.program_id(1) // blocks
    tile = tl.program_id(2)
    is_thumbnail = tile == columns * rows
    vertical_first = tl.where(is_thumbnail, thumbnail_vertical_first, tiles_vertical_first) != 0
    # The tile along each axis; the thumbnail's blocks follow the blocks of the last tile.
    column = tl.where(is_thumbnail, columns, tile % columns)
    row = tl.where(is_thumbnail, rows, tile // columns)
    first_block = tl.where(tiles_vertical_first != 0, row, column) * blocks + u_block
    second_block = tl.where(tiles_vertical_first != 0, column, row) * blocks + v_block
    u_low = tl.multiple_of(tl.load(first_spans + first_block * 2), ALIGN)
    u_high = tl.load(first_spans + first_block * 2 + 1)
    v_low = tl.multiple_of(tl.load(second_spans + second_block * 2), ALIGN)
    v_high = tl.load(second_spans + second_block * 2 + 1)
    pixels = planes + channel.to(tl.int64) * plane
    first_table = first_weights + first_block.to(tl.int64) * first_sources * 2 * BLOCK
    second_table = second_weights + second_block.to(tl.int64) * second_sources * 2 * BLOCK

    coarse = tl.zeros([BLOCK, BLOCK], tl.float32)  # [v, u]: sums of high weights; `fine` of low ones
    fine = tl.zeros([BLOCK, BLOCK], tl.float32)
    for v_step in range(v_low, v_high, SOURCE):
        first_coarse = tl.zeros([SOURCE, BLOCK], tl.float32)  # [v_source, u]
        first_fine = tl.zeros([SOURCE, BLOCK], tl.float32)
        for u_step in range(u_low, u_high, SOURCE):
            # Columns past the image's edge are arbitrary and have a weight of 0; rows past the edge are not in memory.
            if vertical_first:
                levels = tl.trans(_load_square(pixels, u_step, u_high, v_step, pitch, SOURCE))
            else:
                levels = _load_square(pixels, v_step, v_high, u_step, pitch, SOURCE)
            levels = levels.to(tl.float16)  # [v_source, u_source]
            high, low = _weights(first_table, u_step - u_low, BLOCK, SOURCE)  # [u_source, u]
            first_coarse = tl.dot(levels, high, first_coarse)
            first_fine = tl.dot(levels, low, first_fine)
        levels = _round(first_coarse, first_fine).to(tl.float16)
        high, low = _weights(second_table, v_step - v_low, BLOCK, SOURCE)  # [v_source, v]
        coarse = tl.dot(tl.trans(high), levels, coarse)
        fine = tl.dot(tl.trans(low), levels, fine)

    mean = tl.where(channel == 0, MEAN_R, tl.where(channel == 1, MEAN_G, MEAN_B))
    std = tl.where(channel == 0, STD_R, tl.where(channel == 1, STD_G, STD_B))
    result = (_round(coarse, fine).to(tl.float32) / 255.0 - mean) / std
    u = u_block * BLOCK + tl.arange(0, BLOCK)
    v = v_block * BLOCK + tl.arange(0, BLOCK)
    u_out = u * tl.where(vertical_first, TILE, 1)
    v_out = v * tl.where(vertical_first, 1, TILE)
    at = (tile * 3 + channel) * TILE * TILE + v_out[:, None] + u_out[None, :]
    tl.store(tiles + at, result.to(tiles.dtype.element_ty), mask=(v < TILE)[:, None] & (u < TILE)[None, :])


@triton.jit
def _load_square(pixels, y, y_end, x, pitch, SOURCE: tl.constexpr):
    """Load SOURCE rows from y on, 0 from y_end on, of SOURCE columns from x on: [y, x] uint8."""
    rows = y + tl.arange(0, SOURCE)
    at = rows[:, None] * pitch + (x + tl.arange(0, SOURCE))[None, :]
    return tl.load(pixels + at, mask=(rows < y_end)[:, None], other=0)


@triton.jit
def _weights(table, first, BLOCK: tl.constexpr, SOURCE: tl.constexpr):
    """Load (high, low) of SOURCE source pixels from the span's `first` on: each [source, entry] fp16."""
    at = table + (first + tl.arange(0, SOURCE))[:, None] * (2 * BLOCK) + tl.arange(0, BLOCK)[None, :]
    return tl.load(at), tl.load(at + BLOCK)


@triton.jit
def _round(coarse, fine):
    """Round sums of weighted pixels to levels 0..255, int32, as Pillow's clip8 does."""
    level = ((coarse.to(tl.int32) << 12) + fine.to(tl.int32) + (1 << 21)) >> 22
    return tl.minimum(tl.maximum(level, 0), 255)
