"""Computes nvlm::GatedCrossAttention for few rows in two kernels: one attends to chunks of keys, one adds the chunks.

launcher.py starts these kernels for decoding steps. Only lab/gpu_check and the tests call launcher.py; a backend that
runs the decoder in torch would call it, too.

If each program read all keys of its key head, a decoding step of one request would be 8 programs for 132
multiprocessors. Chunks count from key 0 and have one size, so the sums of a row do not depend on other rows. After
T. Dao and others, "Flash-Decoding for long-context inference" (2023).

From compute capability 9.0 on, each kernel starts before the kernel in front has ended, and waits for that end before
it reads anything (programmatic dependent launch): two starts in a row take a tenth of a step's time.
"""

# ruff: noqa: N803, compile-time arguments are in capitals, as in all Triton code
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nvlm_trt.plugins.gated_cross_attention.kernel import attend, load_ranges, range_bounds, tanh, token_and_head


@triton.jit
def attend_chunk_kernel(
    query,  # [B, HEADS, S, HEAD_DIM]
    key,  # [B, KV_HEADS, N, HEAD_DIM]
    value,  # [B, KV_HEADS, N, HEAD_DIM]
    cross_ranges,  # [B, S, 2] int32
    tokens,  # S
    cross_tokens,  # N
    rows,  # B * HEADS * S
    peaks,  # [chunks, B, HEADS, S] fp32: the largest score * log2(e), -inf where the chunk has no key of the row
    sums,  # [chunks, B, HEADS, S] fp32: sums of the weights
    totals,  # [chunks, B, HEADS, S, HEAD_DIM] fp32: sums of the weighted values
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,  # a multiple of KEYS
    ONE_TOKEN: tl.constexpr,  # S is 1, as when decoding
    EARLY: tl.constexpr,  # launched before the kernel in front has ended
):
    """Grid: (B * KV_HEADS, chunks, ceil(S * HEADS / KV_HEADS / ROWS)). All tensors contiguous."""
    if EARLY:
        gdc_wait()
    batch = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    chunk = tl.program_id(1)
    token, head = token_and_head(tl.program_id(2), kv_head, HEADS // KV_HEADS, ROWS)
    in_batch = token < tokens
    chunk_end = tl.minimum((chunk + 1) * CHUNK, cross_tokens)
    ranges = cross_ranges + batch * tokens * 2
    if ONE_TOKEN:  # the rows are the token's heads, so the token's range is the bounds of all rows
        first, last = load_ranges(ranges, True, chunk * CHUNK, chunk_end)
        bounds = first, first, last, last
        start, end = tl.full([ROWS], first, tl.int32), tl.full([ROWS], last, tl.int32)
    else:
        start, end = load_ranges(ranges + token * 2, in_batch, chunk * CHUNK, chunk_end)
        bounds = range_bounds(start, end, cross_tokens)

    dims = tl.arange(0, PADDED_DIM)
    row = (batch * HEADS + head).to(tl.int64) * tokens + token  # [ROWS]
    at = row[:, None] * HEAD_DIM + dims[None, :]
    in_query = in_batch[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(query + at, mask=in_query, other=0.0)  # [ROWS, PADDED_DIM]
    kv_base = (batch * KV_HEADS + kv_head).to(tl.int64) * cross_tokens * HEAD_DIM
    peak, row_sum, total = attend(q, key + kv_base, value + kv_base, start, end, bounds, HEAD_DIM, KEYS)

    if EARLY:  # not earlier: waiting programs would take room on the multiprocessors from this kernel
        gdc_launch_dependents()
    chunk_row = chunk.to(tl.int64) * rows + row
    tl.store(peaks + chunk_row, tl.where(start < end, peak, -float("inf")), mask=in_batch)
    tl.store(sums + chunk_row, row_sum, mask=in_batch)
    tl.store(totals + chunk_row[:, None] * HEAD_DIM + dims[None, :], total, mask=in_query)


@triton.jit
def add_chunks_kernel(
    peaks,
    sums,
    totals,
    gate,  # [1]
    chunks,
    rows,
    output,  # [B, HEADS, S, HEAD_DIM]
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    CHUNKS: tl.constexpr,  # the power of two that holds `chunks`
    EARLY: tl.constexpr,  # launched before the kernel in front has ended
):
    """Grid: (rows,)."""
    if EARLY:
        gdc_wait()
    row = tl.program_id(0)
    chunk = tl.arange(0, CHUNKS)
    dims = tl.arange(0, PADDED_DIM)
    in_chunks = chunk < chunks
    chunk_row = chunk.to(tl.int64) * rows + row  # [CHUNKS]
    peak = tl.load(peaks + chunk_row, mask=in_chunks, other=-float("inf"))
    row_sum = tl.load(sums + chunk_row, mask=in_chunks, other=0.0)
    in_totals = in_chunks[:, None] & (dims < HEAD_DIM)[None, :]
    total = tl.load(totals + chunk_row[:, None] * HEAD_DIM + dims[None, :], mask=in_totals, other=0.0)

    used = peak > -float("inf")
    weight = tl.where(used, tl.exp2(peak - tl.max(peak, 0)), 0.0)  # [CHUNKS]
    # The total of a chunk without keys is meaningless, perhaps NaN: leave it out, because NaN * 0 is NaN.
    total = tl.sum(tl.where(used[:, None], total * weight[:, None], 0.0), 0)  # [PADDED_DIM]
    row_sum = tl.sum(tl.where(used, row_sum * weight, 0.0), 0)
    result = tl.where(row_sum > 0, total * (tanh(tl.load(gate).to(tl.float32)) / row_sum), 0.0)
    tl.store(output + row.to(tl.int64) * HEAD_DIM + dims, result.to(output.dtype.element_ty), mask=dims < HEAD_DIM)
