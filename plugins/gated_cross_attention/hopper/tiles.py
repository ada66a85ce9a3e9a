"""Finds the keys that the rows of a tile see, and the rows' places in the tensors: a tile is ROWS rows of one key head.

Rows are (token, query head of the group) pairs, heads fastest, as in kernel.py. Tiles count with key heads fastest, so
that the tiles at a prompt's begin, which need masks, start first. `sizes` is (tokens, cross_tokens, key heads of the
batch, tiles)."""

# ruff: noqa: N803, N806, compile-time arguments are in capitals, as in all Triton code
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from nvlm_trt.plugins.gated_cross_attention.kernel import load_ranges

ROWS = gl.constexpr(128)  # 64 for each of two warpgroups, which multiply 64 rows at a time
KEYS = gl.constexpr(128)  # per block


@gluon.jit
def walk(tile, cross_ranges, sizes, HEADS: gl.constexpr, KV_HEADS: gl.constexpr):
    """Return a tile's (lowest start, highest end, first key, blocks, whether no row begins or ends within a block).

    A tile has at least one block. Empty rows do not count."""
    layout: gl.constexpr = gl.BlockedLayout([ROWS // 32], [32], [4], [0])  # all rows in each warp
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
    """Return a warpgroup's work on a tile: (start [64], end [64], first key, blocks, whether no row begins or ends
    within a block, the first block after block 0 that needs no mask, the block after the last that needs none)."""
    _, _, first, count, whole = walk(tile, cross_ranges, sizes, HEADS, KV_HEADS)
    _tokens, _cross_tokens, key_heads, _tiles = sizes
    row = tile // key_heads * ROWS + SECOND * 64
    start, end = ranges_of(row, 64, LAYOUT, tile, cross_ranges, sizes, HEADS, KV_HEADS)
    uncut, uncut_end = common(row, first, count, tile, cross_ranges, sizes, HEADS, KV_HEADS)
    return start, end, first, count, whole, gl.where(whole, 1, uncut), gl.where(whole, count, uncut_end)


@gluon.jit
def common(row, first, count, tile, cross_ranges, sizes, HEADS: gl.constexpr, KV_HEADS: gl.constexpr):
    """Find the blocks after the tile's first that all 64 rows from `row` on see, without empty rows: (first, end)."""
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])  # all rows in each warp
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
    """Load (start, end) of COUNT rows of a tile, clipped to the keys. Rows outside the batch have empty ranges."""
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
    """Find a warpgroup's rows of a tile in queries and outputs: (offsets, whether they exist), [64, HEAD_DIM]."""
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
    """Return the layout in which a warpgroup copies rows of `head_dim` 16-bit numbers: 16 bytes per thread."""
    lanes = head_dim // 8
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])
