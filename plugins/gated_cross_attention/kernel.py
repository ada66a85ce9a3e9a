"""The GPU kernel of nvlm::GatedCrossAttention: flash attention over each token's own range of keys.

One program owns ROWS rows of one key head. The rows are (token, query head of the group) pairs, heads fastest, so the
query heads that share a key head are in one block and read the keys once: a decoding step of 8 heads per key head is
half of the 16 rows that a tensor core needs anyway. A program reads keys in aligned blocks of KEYS from the lowest
start to the highest end of its rows, and loads no other keys. The sums of a row do not depend on other rows: a block
without keys of the row leaves the row's sums unchanged, bit for bit.

After T. Dao, FlashAttention-2 (arXiv 2307.08691). The arguments have the order that TensorRT's ahead-of-time plugins
need: inputs, scalars, outputs.
"""

# ruff: noqa: N803, N806, compile-time arguments are in capitals, as in all Triton code
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gated_cross_attention_kernel(
    query,  # [B, HEADS, S, HEAD_DIM]
    key,  # [B, KV_HEADS, N, HEAD_DIM]
    value,  # [B, KV_HEADS, N, HEAD_DIM]
    cross_ranges,  # [B, S, 2] int32
    gate,  # [1]
    tokens,  # S
    cross_tokens,  # N
    output,  # [B, HEADS, S, HEAD_DIM]
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,  # the power of two that holds HEAD_DIM
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Grid: (B * KV_HEADS, ceil(S * HEADS / KV_HEADS / ROWS)). All tensors contiguous.

    Rows are the last axis, so that a prompt's first blocks start first: tile tags need masks and take longest."""
    batch = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    token, head = token_and_head(tl.program_id(1), kv_head, HEADS // KV_HEADS, ROWS)
    in_batch = token < tokens
    start, end = load_ranges(cross_ranges + (batch * tokens + token) * 2, in_batch, 0, cross_tokens)  # [ROWS]

    dims = tl.arange(0, PADDED_DIM)
    query_at = ((batch * HEADS + head).to(tl.int64) * tokens + token) * HEAD_DIM  # [ROWS]
    query_at = query_at[:, None] + dims[None, :]
    in_query = in_batch[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(query + query_at, mask=in_query, other=0.0)  # [ROWS, PADDED_DIM]
    kv_base = (batch * KV_HEADS + kv_head).to(tl.int64) * cross_tokens * HEAD_DIM
    bounds = range_bounds(start, end, cross_tokens)
    _, row_sum, total = attend(q, key + kv_base, value + kv_base, start, end, bounds, HEAD_DIM, KEYS)

    result = total * (tanh(tl.load(gate).to(tl.float32)) / row_sum)[:, None]
    result = tl.where((start < end)[:, None], result, 0.0)
    tl.store(output + query_at, result.to(output.dtype.element_ty), mask=in_query)


@triton.jit
def token_and_head(block, kv_head, group: tl.constexpr, ROWS: tl.constexpr):
    """Return (token, query head) of a block's rows, each [ROWS]."""
    row = block * ROWS + tl.arange(0, ROWS)
    return row // group, kv_head * group + row % group


@triton.jit
def load_ranges(at, in_batch, lowest, highest):
    """Load (start, end) at pointers [ROWS], clipped to lowest..highest. Rows outside the batch have empty ranges."""
    start = tl.maximum(tl.load(at, mask=in_batch, other=0), lowest)
    end = tl.minimum(tl.load(at + 1, mask=in_batch, other=0), highest)
    return start, end


@triton.jit
def range_bounds(start, end, cross_tokens):
    """Return (lowest start, highest start, lowest end, highest end) of ranges [ROWS], without the empty ranges."""
    empty = start >= end
    lowest_start = tl.min(tl.where(empty, cross_tokens, start))
    highest_start = tl.max(tl.where(empty, 0, start))
    lowest_end = tl.min(tl.where(empty, cross_tokens, end))
    highest_end = tl.max(tl.where(empty, 0, end))
    return lowest_start, highest_start, lowest_end, highest_end


@triton.jit
def attend(
    query,  # [ROWS, PADDED_DIM], zero in padded dims
    keys,  # pointer to this key head: rows of HEAD_DIM
    values,
    start,  # [ROWS]
    end,
    bounds,  # (lowest start, highest start, lowest end, highest end)
    HEAD_DIM: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Return fp32 (largest score * log2(e) [ROWS], sum of weights [ROWS], weighted sum of values [ROWS, PADDED_DIM]).

    Weights are relative to the weight of the largest score. The result is meaningless for rows of empty ranges."""
    rows: tl.constexpr = query.shape[0]
    lowest, common_start, common_end, highest = bounds
    first = lowest // KEYS * KEYS
    # Blocks whose keys every row reads need no mask.
    common_first = tl.maximum(tl.cdiv(common_start, KEYS) * KEYS, first)
    common_last = tl.maximum(common_end // KEYS * KEYS, common_first)

    row_max = tl.full([rows], -float("inf"), tl.float32)
    row_sum = tl.zeros([rows], tl.float32)
    total = tl.zeros(query.shape, tl.float32)
    # When decoding, even a loop without iterations costs measurable time. With more rows, a branch around the products
    # would make the assembler run the products one after the other (C7515).
    ALWAYS: tl.constexpr = rows > 16
    if ALWAYS or first < common_first:
        row_max, row_sum, total = _attend_blocks(
            *(query, keys, values, start, end, lowest, highest, row_max, row_sum, total),
            *(first, common_first, HEAD_DIM, KEYS, True),
        )
    row_max, row_sum, total = _attend_blocks(
        *(query, keys, values, start, end, lowest, highest, row_max, row_sum, total),
        *(common_first, common_last, HEAD_DIM, KEYS, False),
    )
    if ALWAYS or common_last < highest:
        row_max, row_sum, total = _attend_blocks(
            *(query, keys, values, start, end, lowest, highest, row_max, row_sum, total),
            *(common_last, highest, HEAD_DIM, KEYS, True),
        )
    return row_max, row_sum, total


@triton.jit
def _attend_blocks(
    query,
    keys,
    values,
    start,
    end,
    lowest,
    highest,
    row_max,
    row_sum,
    total,
    first,
    last,
    HEAD_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the keys of the blocks first, first + KEYS, ... < last to the running maximum, sum and weighted values."""
    # exp(x) = exp2(x * log2(e)): the hardware has exp2
    scale: tl.constexpr = HEAD_DIM**-0.5 * 1.4426950408889634
    for block in range(first, last, KEYS):
        at = block + tl.arange(0, KEYS)
        k = _load_rows(keys, at, lowest, highest, HEAD_DIM, query.shape[1], MASKED)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee")  # "ieee": fp32 is for checks, not for speed
        if MASKED:
            visible = (at[None, :] >= start[:, None]) & (at[None, :] < end[:, None])
            scores = tl.where(visible, scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
        shift = new_max
        if MASKED:
            shift = tl.where(new_max == -float("inf"), 0.0, new_max)  # no key so far: -inf - -inf is NaN
        # fma gives the same bits with a mask and without, in one instruction
        weights = tl.exp2(tl.fma(scores, scale, -shift[:, None]))
        decay = tl.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        v = _load_rows(values, at, lowest, highest, HEAD_DIM, query.shape[1], MASKED)
        total = total * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        row_max = new_max
    return row_max, row_sum, total


@triton.jit
def _load_rows(
    base,
    at,  # [KEYS], rows of HEAD_DIM
    lowest,
    highest,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load rows `at` of keys or values, [KEYS, dims]: 0 in padded dims and, if MASKED, outside lowest..highest."""
    dims = tl.arange(0, PADDED_DIM)
    pointers = base + at[:, None] * HEAD_DIM + dims[None, :]
    if MASKED:
        in_range = (at >= lowest) & (at < highest)
        return tl.load(pointers, mask=in_range[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    if PADDED_DIM != HEAD_DIM:
        return tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def tanh(x):
    """Compute tanh without libdevice, which the interpreter lacks. Relative error 1e-6, by a series near 0."""
    decay = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - decay) / (1.0 + decay)
    series = x * (1.0 - x * x * (1.0 / 3.0 - x * x * (2.0 / 15.0)))
    return tl.where(tl.abs(x) < 0.1, series, tl.where(x < 0, -magnitude, magnitude))
