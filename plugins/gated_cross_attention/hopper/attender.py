"""Attends, as one partition: multiplies the keys of a block and the values of the block before at the same time.

The sums of a row do not depend on other rows. The partition skips blocks outside the tile's lowest start and highest
end, and a block that a row does not see leaves the row's sums unchanged, bit for bit."""

# ruff: noqa: N803, N806, compile-time arguments are in capitals, as in all Triton code
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from nvlm_trt.plugins.gated_cross_attention.hopper.loader import KEY_STAGES, VALUE_STAGES
from nvlm_trt.plugins.gated_cross_attention.hopper.products import masked, multiply_keys, multiply_values, softmax
from nvlm_trt.plugins.gated_cross_attention.hopper.tiles import KEYS, copy_layout, plan, rows_at
from nvlm_trt.plugins.gated_cross_attention.hopper.turns import pass_turn, take_turn
from nvlm_trt.plugins.gated_cross_attention.kernel import tanh


@gluon.jit
def attend(
    tensors,
    queries,
    blocks,
    sizes,
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    SECOND: gl.constexpr,  # 0 or 1: the first or the last 64 rows of a tile
):
    """Attend with one warpgroup's 64 rows of every tile of this program."""
    query, cross_ranges, gate, output = tensors
    keys, values, keys_full, keys_empty, values_full, values_empty = blocks
    _tokens, _cross_tokens, _key_heads, tiles = sizes
    HEAD_DIM: gl.constexpr = keys.shape[3]
    layout: gl.constexpr = copy_layout(HEAD_DIM)
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    total_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)

    query_at, in_query = rows_at(gl.program_id(0), sizes, HEADS, KV_HEADS, HEAD_DIM, SECOND, layout)
    async_copy.async_copy_global_to_shared(queries.index(SECOND), query + query_at, mask=in_query)
    async_copy.commit_group()
    tanh_gate = tanh(gl.load(gate).to(gl.float32))
    if SECOND:
        pass_turn(SECOND)  # the first warpgroup begins
    n = 0  # blocks so far
    parity = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        q = queries.index(parity * 2 + SECOND)
        async_copy.wait_group(0)
        fence_async_shared()
        stage = n % KEY_STAGES
        mbarrier.wait(keys_full.index(stage), n // KEY_STAGES & 1)
        take_turn(SECOND)
        scores = multiply_keys(q, keys.index(stage), score_layout)
        pass_turn(SECOND)
        # during these products: fetch the next tile's queries, and find what this tile sees
        next_at, in_next = rows_at(tile + gl.num_programs(0), sizes, HEADS, KV_HEADS, HEAD_DIM, SECOND, layout)
        async_copy.async_copy_global_to_shared(queries.index((parity ^ 1) * 2 + SECOND), query + next_at, mask=in_next)
        async_copy.commit_group()
        start, end, first, count, whole, uncut, uncut_end = plan(
            tile, cross_ranges, sizes, HEADS, KV_HEADS, SECOND, row_layout
        )

        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(keys_empty.index(stage), count=1)
        visible = start < end
        if whole:
            visible = (start <= first) & (first < end)
        else:
            scores = masked(scores, first, start, end)
        row_max = gl.full([64], -float("inf"), gl.float32, row_layout)
        weights, row_max, decay, sums = softmax(scores, row_max, visible, HEAD_DIM)
        mbarrier.wait(keys_full.index((n + 1) % KEY_STAGES), (n + 1) // KEY_STAGES & 1, pred=count > 1)
        state = (row_max, sums, gl.zeros([64, HEAD_DIM], gl.float32, total_layout), weights, decay)

        tile_end = n + count
        block = first - n * KEYS  # the key at which block n = 0 would begin
        state = attend_blocks(q, blocks, start, end, block, n + 1, n + uncut, tile_end, state, SECOND, True)
        state = attend_blocks(q, blocks, start, end, block, n + uncut, n + uncut_end, tile_end, state, SECOND, False)
        state = attend_blocks(q, blocks, start, end, block, n + uncut_end, tile_end, tile_end, state, SECOND, True)
        _, sums, total, weights, decay = state
        n = tile_end
        stage = (n - 1) % VALUE_STAGES
        mbarrier.wait(values_full.index(stage), (n - 1) // VALUE_STAGES & 1)
        total, _ = multiply_values(total, weights, decay, values.index(stage))
        factor = tanh_gate / gl.convert_layout(gl.sum(sums, 1), row_layout)
        factor = gl.convert_layout(gl.where(start < end, factor, 0.0), gl.SliceLayout(1, total_layout))[:, None]
        total = warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(values_empty.index(stage), count=1)
        # the sums of empty ranges may be NaN
        q.store(gl.where(factor == 0.0, 0.0, total * factor).to(q.dtype))
        at, inside = rows_at(tile, sizes, HEADS, KV_HEADS, HEAD_DIM, SECOND, layout)
        gl.store(output + at, q.load(layout), mask=inside)
        parity ^= 1
    if not SECOND:
        take_turn(SECOND)  # the last turn that was passed, so that the barrier ends as it began


@gluon.jit
def attend_blocks(
    q,
    blocks,
    start,  # [64]
    end,
    block_at,  # the first key of block 0, were it in this tile
    n_first,
    n_last,
    n_end,  # the tile's last block + 1
    state,
    SECOND: gl.constexpr,
    CUT: gl.constexpr,  # whether rows may begin or end within these blocks
):
    """Attend to the blocks n_first..n_last. State: the largest scores [64] and sums [64, 8] so far; the values weighted
    up to the block before the last; the last block's weights [64, KEYS] and its factors of those values [64]."""
    keys, values, keys_full, keys_empty, values_full, values_empty = blocks
    row_max, row_sum, total, weights, decay = state
    HEAD_DIM: gl.constexpr = keys.shape[3]
    LAYOUT: gl.constexpr = weights.type.layout
    for n in range(n_first, n_last):
        stage = n % KEY_STAGES
        before = (n - 1) % VALUE_STAGES
        take_turn(SECOND)
        scores = multiply_keys(q, keys.index(stage), LAYOUT)
        # A wait ends a basic block. Without this wait, ptxas would put the work for the values between the products of
        # the scores. Without the wait below, ptxas would await the values before the exponentials.
        mbarrier.wait(values_full.index(before), (n - 1) // VALUE_STAGES & 1)
        total, p = multiply_values(total, weights, decay, values.index(before))
        pass_turn(SECOND)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        at = block_at + n * KEYS
        if CUT:
            scores = masked(scores, at, start, end)
            visible = start < end
        else:
            visible = (start <= at) & (at < end)
        weights, row_max, decay, sums = softmax(scores, row_max, visible, HEAD_DIM)
        row_sum = row_sum * gl.convert_layout(decay, gl.SliceLayout(1, row_sum.type.layout))[:, None] + sums
        mbarrier.wait(keys_full.index((n + 1) % KEY_STAGES), (n + 1) // KEY_STAGES & 1, pred=n + 1 < n_end)
        total, p, weights, row_sum = warpgroup_mma_wait(0, deps=(total, p, weights, row_sum))
        mbarrier.arrive(keys_empty.index(stage), count=1)
        mbarrier.arrive(values_empty.index(before), count=1)
    return row_max, row_sum, total, weights, decay
