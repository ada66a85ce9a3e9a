"""Sets up the kernel for prompts on Hopper: shared memory, barriers and three partitions."""

# ruff: noqa: N803, compile-time arguments are in capitals, as in all Triton code
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nvlm_trt.plugins.gated_cross_attention.hopper.attender import attend
from nvlm_trt.plugins.gated_cross_attention.hopper.loader import KEY_STAGES, VALUE_STAGES, load
from nvlm_trt.plugins.gated_cross_attention.hopper.tiles import KEYS

REGISTERS = gl.constexpr(240)  # per thread that attends: 2 * 240 + 24 are the 3 * 168 that the program starts with
LOADER_REGISTERS = gl.constexpr(24)
# Triton's options. The partitions start 8 more warps. The kernel starts before the kernel in front has ended.
OPTIONS = {"num_warps": 4, "maxnreg": 168, "launch_pdl": True}


@gluon.jit(do_not_specialize=["tokens", "cross_tokens", "key_heads", "tiles"])
def prefill_kernel(
    query,  # [B, HEADS, S, HEAD_DIM]
    key_blocks,  # descriptor of [B * KV_HEADS, N, HEAD_DIM] in blocks of [1, KEYS, HEAD_DIM]
    value_blocks,
    value,  # [B, KV_HEADS, N, HEAD_DIM]
    cross_ranges,  # [B, S, 2] int32
    gate,  # [1]
    tokens,  # S
    cross_tokens,  # N
    key_heads,  # B * KV_HEADS
    tiles,  # key_heads * ceil(S * HEADS / KV_HEADS / ROWS)
    output,  # [B, HEADS, S, HEAD_DIM]
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
):
    """Grid: (programs,), at most `tiles`. Compile with OPTIONS.

    Tiles count with key heads fastest, so that the tiles at a prompt's begin, which need masks, start first."""
    dtype: gl.constexpr = query.dtype.element_ty
    query_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, HEAD_DIM], dtype)
    queries = gl.allocate_shared_memory(dtype, [4, 64, HEAD_DIM], query_layout)  # for this tile and the next
    keys = gl.allocate_shared_memory(dtype, [KEY_STAGES, 1, KEYS, HEAD_DIM], key_blocks.layout)
    values = gl.allocate_shared_memory(dtype, [VALUE_STAGES, 1, KEYS, HEAD_DIM], value_blocks.layout)
    keys_full = gl.allocate_shared_memory(gl.int64, [KEY_STAGES, 1], mbarrier.MBarrierLayout())
    keys_empty = gl.allocate_shared_memory(gl.int64, [KEY_STAGES, 1], mbarrier.MBarrierLayout())
    values_full = gl.allocate_shared_memory(gl.int64, [VALUE_STAGES, 1], mbarrier.MBarrierLayout())
    values_empty = gl.allocate_shared_memory(gl.int64, [VALUE_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(KEY_STAGES):
        mbarrier.init(keys_full.index(stage), count=1)
        mbarrier.init(keys_empty.index(stage), count=2)
    for stage in gl.static_range(VALUE_STAGES):
        mbarrier.init(values_full.index(stage), count=1)
        mbarrier.init(values_empty.index(stage), count=2)
    fence_async_shared()
    gdc_launch_dependents()
    gdc_wait()  # the kernel in front must end before this kernel reads anything

    sizes = (tokens, cross_tokens, key_heads, tiles)
    blocks = (keys, values, keys_full, keys_empty, values_full, values_empty)
    tensors = (query, cross_ranges, gate, output)
    gl.warp_specialize(
        [
            (attend, (tensors, queries, blocks, sizes, HEADS, KV_HEADS, 0)),
            (attend, (tensors, queries, blocks, sizes, HEADS, KV_HEADS, 1)),
            (load, (key_blocks, value_blocks, value, cross_ranges, blocks, sizes, HEADS, KV_HEADS)),
        ],
        [4, 4],  # warps of the last two partitions; the first has the program's warps
        [REGISTERS, LOADER_REGISTERS],
    )
