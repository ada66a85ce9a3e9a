"""Fetches blocks of keys and values into shared memory, as one partition."""

# ruff: noqa: N803, N806, compile-time arguments are in capitals, as in all Triton code
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from nvlm_trt.plugins.gated_cross_attention.hopper.tiles import KEYS, copy_layout, walk

KEY_STAGES = gl.constexpr(3)
VALUE_STAGES = gl.constexpr(2)  # together with two tiles of queries, 224 of 227 KB


@gluon.jit
def load(key_blocks, value_blocks, value, cross_ranges, blocks, sizes, HEADS: gl.constexpr, KV_HEADS: gl.constexpr):
    """Fetch the blocks of all tiles of this program, in the order in which the warpgroups attend to them."""
    keys, values, keys_full, keys_empty, values_full, values_empty = blocks
    _tokens, cross_tokens, key_heads, tiles = sizes
    HEAD_DIM: gl.constexpr = keys.shape[3]
    BYTES: gl.constexpr = KEYS * HEAD_DIM * keys.dtype.primitive_bitwidth // 8
    layout: gl.constexpr = copy_layout(HEAD_DIM)
    n = 0  # blocks so far
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        key_head = tile % key_heads
        lowest, highest, first, count, _ = walk(tile, cross_ranges, sizes, HEADS, KV_HEADS)
        for i in range(count + 1):  # a block's keys, then the values of the block before, which are used together
            if i < count:
                stage = n % KEY_STAGES
                mbarrier.wait(keys_empty.index(stage), n // KEY_STAGES & 1 ^ 1)
                full = keys_full.index(stage)
                mbarrier.expect(full, BYTES)
                tma.async_copy_global_to_shared(key_blocks, [key_head, first + i * KEYS, 0], full, keys.index(stage))
            if i > 0:
                at = first + (i - 1) * KEYS
                stage = (n - 1) % VALUE_STAGES
                mbarrier.wait(values_empty.index(stage), (n - 1) // VALUE_STAGES & 1 ^ 1)
                full = values_full.index(stage)
                if (at >= lowest) & ((at + KEYS <= highest) | (highest == cross_tokens)):
                    # the copy engine fills a block that reaches beyond the last value with zeros
                    mbarrier.expect(full, BYTES)
                    tma.async_copy_global_to_shared(value_blocks, [key_head, at, 0], full, values.index(stage))
                else:
                    # values outside lowest..highest may be NaN, and NaN * 0 is NaN: load zeros instead
                    key = at + gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout))
                    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, layout))
                    pointers = value + key_head.to(gl.int64) * cross_tokens * HEAD_DIM
                    pointers = pointers + key[:, None] * HEAD_DIM + dims[None, :]
                    inside = ((key >= lowest) & (key < highest))[:, None] & (dims < HEAD_DIM)[None, :]
                    block = values.index(stage).reshape([KEYS, HEAD_DIM])
                    async_copy.async_copy_global_to_shared(block, pointers, mask=inside)
                    async_copy.commit_group()
                    async_copy.wait_group(0)
                    fence_async_shared()
                    mbarrier.arrive(full, count=1)
            n += 1
        n -= 1  # the last iteration fetched values only
