"""Starts Hopper's kernel for prompts on torch tensors, for ../launcher.py."""

from __future__ import annotations

import triton
from torch import Tensor, cuda
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nvlm_trt.plugins.gated_cross_attention.hopper.kernel import OPTIONS, prefill_kernel
from nvlm_trt.plugins.gated_cross_attention.hopper.tiles import KEYS, ROWS

HEAD_DIMS = (64, 128)


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tell whether the kernel takes these tensors on a device of compute capability 9.0."""
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in (query, key, value))  # the kernel copies 16 bytes at a time
    return query.shape[3] in HEAD_DIMS and query.element_size() == 2 and key.shape[2] > 0 and aligned


def prefill(query: Tensor, key: Tensor, value: Tensor, cross_ranges: Tensor, gate: Tensor, output: Tensor) -> None:
    """Compute gated_cross_attention into `output`, which is not empty, for tensors that ../launcher.py has checked and
    that pass `fits`."""
    batch, heads, tokens, head_dim = query.shape
    kv_heads, cross_tokens = key.shape[1:3]
    key_heads = batch * kv_heads
    block = [1, KEYS.value, head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.float16)  # the same for bf16
    shape, strides = [key_heads, cross_tokens, head_dim], [cross_tokens * head_dim, head_dim, 1]
    key_blocks, value_blocks = (TensorDescriptor(tensor, shape, strides, block, layout) for tensor in (key, value))
    tiles = key_heads * triton.cdiv(tokens * (heads // kv_heads), ROWS.value)
    programs = min(tiles, cuda.get_device_properties(query.device).multi_processor_count)
    arguments = (query, key_blocks, value_blocks, value, cross_ranges, gate)
    prefill_kernel[(programs,)](
        *(*arguments, tokens, cross_tokens, key_heads, tiles, output),
        **{"HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, **OPTIONS},
    )
