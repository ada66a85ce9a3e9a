"""A tile: ROWS rows of one key head, what they see of its keys, and where they lie.

Rows are (token, query head of the group) pairs, heads fastest, as in kernel.py. Tiles are counted with key heads
fastest, so that those with masks, at a prompt's begin, are begun first. `sizes` is (tokens, cross_tokens, key heads of
the batch, tiles)."""

# ruff: noqa: N803, N806, compile-time arguments are in capitals, as in all Triton code
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from nvlm_trt.plugins.gated_cross_attention.kernel import load_ranges

ROWS = gl.constexpr(128)  # 64, what a warpgroup multiplies at a time, for each of two
KEYS = gl.constexpr(128)  # of a block


@gluon.jit
def walk(tile, cross_ranges, sizes, HEADS: gl.constexpr, KV_HEADS: gl.constexpr):
    """Of a tile: (lowest start, highest end, first key, blocks, whether no row begins or ends within a block).

    At least one block. Empty rows do not count."""
    layout: gl.constexpr = gl.BlockedLayout([ROWS // 32], [32], [4], [0])  # all in each warp
    _tokens, cross_tokens, key_heads, _tiles = sizes
    row = tile // key_heads * ROWS
    start, end = ranges_of(row, ROWS, layout, tile, cross_ranges, sizes, HEADS, KV_HEADS)
    empty = start >= end
    lowest = gl.min(gl.where(empty, cross_tokens, start), 0)
    highest = gl.max(gl.where(empty, 0, end), 0)
    first = gl.minimum(lowest, highest) // KEYS * KEYS
    cut = gl.max(gl.where(empty, 0, (start | end) % KEYS), 0)
    return lowest, highest, first, gl.maximum(gl.cdiv(highest - first, KEYS), 1), cut == 0


@gluon.jit
def plan(
    tile,
    cross_ranges,
    sizes,
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    SECOND: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """What a warpgroup does with a tile: (start [64], end, first key, blocks, whether no row begins or ends within one,
    first block after block 0 that needs no mask, the one after the last)."""
    _, _, first, count, whole = walk(tile, cross_ranges, sizes, HEADS, KV_HEADS)
    _tokens, _cross_tokens, key_heads, _tiles = sizes
    row = tile // key_heads * ROWS + SECOND * 64
    start, end = ranges_of(row, 64, LAYOUT, tile, cross_ranges, sizes, HEADS, KV_HEADS)
    uncut, uncut_end = common(row, first, count, tile, cross_ranges, sizes, HEADS, KV_HEADS)
    return start, end, first, count, whole, gl.where(whole, 1, uncut), gl.where(whole, count, uncut_end)


@gluon.jit
def common(row, first, count, tile, cross_ranges, sizes, HEADS: gl.constexpr, KV_HEADS: gl.constexpr):
    """Of the tile's blocks after the first, those that all rows from `row` on see, but for empty ones: (first, end)."""
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])  # all in each warp
    start, end = ranges_of(row, 64, layout, tile, cross_ranges, sizes, HEADS, KV_HEADS)
    empty = start >= end
    start = gl.max(gl.where(empty, 0, start), 0)
    end = gl.min(gl.where(empty, first + count * KEYS, end), 0)
    uncut = gl.minimum(gl.maximum(gl.cdiv(gl.maximum(start - first, 0), KEYS), 1), count)
    return uncut, gl.minimum(gl.maximum(gl.maximum(end - first, 0) // KEYS, uncut), count)


@gluon.jit
def ranges_of(
    row,
    COUNT: gl.constexpr,
    LAYOUT: gl.constexpr,
    tile,
    cross_ranges,
    sizes,
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
):
    """(start, end) of rows of a tile, clipped to the keys; of rows outside the batch empty: [COUNT]."""
    tokens, cross_tokens, key_heads, _tiles = sizes
    token = (row + gl.arange(0, COUNT, layout=LAYOUT)) // (HEADS // KV_HEADS)
    at = cross_ranges + (tile % key_heads // KV_HEADS * tokens + token) * 2
    return load_ranges(at, token < tokens, 0, cross_tokens)


@gluon.jit
def rows_at(
    tile,
    sizes,
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    SECOND: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """A warpgroup's rows of a tile in queries and outputs: (offsets, whether they are there), [64, HEAD_DIM]."""
    tokens, _, key_heads, tiles = sizes
    GROUP: gl.constexpr = HEADS // KV_HEADS
    key_head = tile % key_heads
    row = tile // key_heads * ROWS + SECOND * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    token = row // GROUP
    head = key_head // KV_HEADS * HEADS + key_head % KV_HEADS * GROUP + row % GROUP
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT))
    at = (head.to(gl.int64) * tokens + token) * HEAD_DIM
    inside = (token < tokens) & (tile < tiles)
    return at[:, None] + dims[None, :], inside[:, None] & (dims < HEAD_DIM)[None, :]


@gluon.constexpr_function
def copy_layout(head_dim):
    """Of a warpgroup that copies rows of `head_dim` 16-bit numbers: 16 bytes a thread."""
    lanes = head_dim // 8
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])
