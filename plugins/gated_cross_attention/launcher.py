"""Runs nvlm::GatedCrossAttention on torch tensors.

Only lab/gpu_check and the tests call this launcher; a backend that runs the decoder in torch would call it, too.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from nvlm_trt.plugins.gated_cross_attention.blocks import BLOCKS, HEAD_DIMS, Blocks, choose_blocks, padded_dim
from nvlm_trt.plugins.gated_cross_attention.kernel import gated_cross_attention_kernel
from nvlm_trt.plugins.gated_cross_attention.split_kernel import add_chunks_kernel, attend_chunk_kernel

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def gated_cross_attention(
    query: Tensor, key: Tensor, value: Tensor, cross_ranges: Tensor, gate: Tensor, blocks: Blocks | None = None
) -> Tensor:
    """Compute tanh(gate) * attention of each token over its own range of keys, as onnx_function.py defines it.

    query [B, H, S, D]; key, value [B, KV, N, D]; fp16, bf16 or fp32, contiguous; cross_ranges [B, S, 2] int32; gate [1]
    of any float type -> [B, H, S, D]. D is 32, 64, 80, 96 or 128 and H a multiple of KV. Ranges are clipped to 0..N; an
    empty range gives exactly zero. Values between the lowest and the highest key that neighbouring tokens read must be
    finite; the kernel does not use other values. All tensors are on one GPU (or on the CPU with TRITON_INTERPRET=1).

    Prompts on Hopper take the kernel in hopper/; all other calls take block sizes from the table. `blocks` overrides
    both. Raises ValueError for tensors that do not fit this description."""
    _check(query, key, value, cross_ranges, gate)
    batch, heads, tokens, head_dim = query.shape
    kv_heads, cross_tokens = key.shape[1:3]
    output = torch.empty_like(query)
    rows = tokens * (heads // kv_heads)  # rows per key head
    if not output.numel():  # CUDA refuses an empty grid
        return output
    capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else (0, 0)
    if blocks is None and rows > BLOCKS[2].rows and capability == (9, 0):
        from nvlm_trt.plugins.gated_cross_attention.hopper import launcher as hopper

        if hopper.fits(query, key, value):
            hopper.prefill(query, key, value, cross_ranges, gate, output)
            return output
    blocks = blocks or choose_blocks(rows, query.element_size())
    row_blocks = triton.cdiv(rows, blocks.rows)
    options: dict[str, Any] = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded_dim(head_dim),
        "ROWS": blocks.rows,
        "KEYS": blocks.keys(head_dim, query.element_size()),
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
    if blocks.chunk is None or cross_tokens <= blocks.chunk:
        arguments = (query, key, value, cross_ranges, gate, tokens, cross_tokens, output)
        gated_cross_attention_kernel[(batch * kv_heads, row_blocks)](*arguments, **options)
        return output
    chunks = triton.cdiv(cross_tokens, blocks.chunk)
    peaks, sums = query.new_empty((2, chunks, *query.shape[:3]), dtype=torch.float32)
    totals = query.new_empty((chunks, *query.shape), dtype=torch.float32)
    padded_chunks = triton.next_power_of_2(chunks)
    all_rows = batch * heads * tokens
    early: dict[str, Any] = {"EARLY": True, "launch_pdl": True} if capability >= (9, 0) else {"EARLY": False}
    attend_chunk_kernel[(batch * kv_heads, chunks, row_blocks)](
        *(query, key, value, cross_ranges, tokens, cross_tokens, all_rows, peaks, sums, totals),
        CHUNK=blocks.chunk,
        ONE_TOKEN=tokens == 1,
        **early,
        **options,
    )
    add_chunks_kernel[(all_rows,)](
        *(peaks, sums, totals, gate, chunks, all_rows, output),
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        CHUNKS=padded_chunks,
        **early,
        num_warps=max(1, padded_chunks // 16),
    )
    return output


def _check(query: Tensor, key: Tensor, value: Tensor, cross_ranges: Tensor, gate: Tensor) -> None:
    def require(condition: bool, remedy: str) -> None:
        if not condition:
            found = ", ".join(
                f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
                for name, tensor in zip(
                    ("query", "key", "value", "cross_ranges", "gate"),
                    (query, key, value, cross_ranges, gate),
                    strict=True,
                )
            )
            raise ValueError(f"gated_cross_attention: {remedy}; got {found}")

    require(query.dim() == 4 and key.dim() == 4, "query must be [B, H, S, D], key [B, KV, N, D]")
    batch, heads, tokens, head_dim = query.shape
    kv_heads = key.shape[1]
    require(key.shape[0] == batch and key.shape[3] == head_dim, "key must have the query's batch and head size")
    require(value.shape == key.shape, "value must have the key's shape")
    require(kv_heads > 0 and heads % kv_heads == 0, "the query's heads must be a multiple of the key's")
    require(head_dim in HEAD_DIMS, f"the head size must be one of {HEAD_DIMS}")
    require(query.dtype in _DTYPES, "the query must be float16, bfloat16 or float32")
    require(key.dtype == value.dtype == query.dtype, "key and value must have the query's type")
    require(
        tuple(cross_ranges.shape) == (batch, tokens, 2) and cross_ranges.dtype == torch.int32,
        "cross_ranges must be [B, S, 2] int32",
    )
    require(gate.numel() == 1 and gate.is_floating_point(), "gate must be one floating-point number")
    contiguous = all(tensor.is_contiguous() for tensor in (query, key, value, cross_ranges))
    require(contiguous, "query, key, value and cross_ranges must be contiguous")
    one_device = {tensor.device for tensor in (query, key, value, cross_ranges, gate)} == {query.device}
    require(one_device, "all tensors must be on one device")
