"""Makes TRT_Attention and TRT_KVCacheUpdate model-local ONNX functions, so that TensorRT's graphs also run on a CPU.

TensorRT's ONNX parser takes these names as its own operators, in any domain, before it looks at functions. ONNX Runtime
inlines the functions, which compute what onnx-tensorrt documents for the operators (docs/custom_operators.md).
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import build_function

DOMAIN = "nvlm"
MASKED_DOMAIN = "nvlm.masked"  # a model has one function of a name in each domain
ATTENTION = "TRT_Attention"
CACHE_UPDATE = "TRT_KVCacheUpdate"

# Without this attribute, a build fails on a GPU that has no fused kernel for a shape or type. TensorRT's engine
# inspector shows which kernels were taken.
DECOMPOSABLE: dict[str, str | int] = {"TRT_decomposable": 1}
CAUSAL: dict[str, str | int] = {"causal_kind": "lower_right", **DECOMPOSABLE}


def trt_attention(opset: int) -> ir.Function:
    """Make (query [B, H, S, D], key [B, KV, N, D], value [B, KV, N, D]) -> [B, H, S, D], called with DECOMPOSABLE.

    Every query reads every key. The function does not scale scores: the caller scales the query."""
    return build_function(_all_keys, _values("QKV"), domain=DOMAIN, name=ATTENTION, **_signature(DECOMPOSABLE, opset))


def masked_trt_attention(opset: int) -> ir.Function:
    """Make (query [B, H, S, D], key [B, KV, N, D], value [B, KV, N, D], mask [B, 1, S, N] bool) -> [B, H, S, D], called
    with DECOMPOSABLE.

    A query reads the keys whose mask is true. The function does not scale scores: the caller scales the query."""
    inputs = _values(("Q", "K", "V", "attn_mask"))
    signature = _signature(DECOMPOSABLE, opset)
    return build_function(_masked_keys, inputs, domain=MASKED_DOMAIN, name=ATTENTION, **signature)


def causal_trt_attention(opset: int) -> ir.Function:
    """Make (query [B, H, S, D], key [B, KV, N, D], value [B, KV, N, D], None, None, kv_lengths [B] int32)
    -> [B, H, S, D], called with CAUSAL.

    Query s of sequence b reads the keys n <= kv_lengths[b] - S + s: the last query reads all keys in use. The function
    does not scale scores: the caller scales the query."""
    inputs = _values(("Q", "K", "V", "attn_mask", "query_lengths", "kv_lengths"))
    return build_function(_used_keys, inputs, domain=DOMAIN, name=ATTENTION, **_signature(CAUSAL, opset))


def trt_cache_update(opset: int) -> ir.Function:
    """Make (past_cache [B, KV, L, D], update [B, KV, S, D], write_indices [B] int32) -> [B, KV, L, D], the same memory.

    `opset` is 24 or later: 24 brought TensorScatter."""
    inputs = _values(("past_cache", "update", "write_indices"))
    return build_function(_scatter, inputs, domain=DOMAIN, name=CACHE_UPDATE, opset_imports={"": opset})


def _values(names: Any) -> list[ir.Value]:
    return [ir.Value(name=name) for name in names]


def _signature(attributes: dict[str, str | int], opset: int) -> dict[str, Any]:
    types = {str: ir.AttributeType.STRING, int: ir.AttributeType.INT}
    declared = {name: ir.Attr(name, types[type(value)], None) for name, value in attributes.items()}
    return {"attributes": declared, "opset_imports": {"": opset}}


def _all_keys(op: Any, query: ir.Value, key: ir.Value, value: ir.Value) -> ir.Value:
    return op.Attention(query, key, value, scale=1.0)


def _masked_keys(op: Any, query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value) -> ir.Value:
    return op.Attention(query, key, value, mask, scale=1.0)


def _used_keys(
    op: Any, query: ir.Value, key: ir.Value, value: ir.Value, _mask: ir.Value, _lengths: ir.Value, kv_lengths: ir.Value
) -> ir.Value:
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    tokens = op.Squeeze(op.Shape(query, start=2, end=3))
    capacity = op.Squeeze(op.Shape(key, start=2, end=3))
    axes = op.Constant(value_ints=[1, 2])
    cached = op.Sub(op.Unsqueeze(op.Cast(kv_lengths, to=ir.DataType.INT64), axes), tokens)  # [B, 1, 1]
    rows = op.Unsqueeze(op.Range(zero, tokens, one), op.Constant(value_ints=[1]))  # [S, 1]
    last = op.Add(cached, rows)  # [B, S, 1]
    visible = op.LessOrEqual(op.Range(zero, capacity, one), last)  # [B, S, N]
    return op.Attention(query, key, value, op.Unsqueeze(visible, op.Constant(value_ints=[1])), scale=1.0)


def _scatter(op: Any, cache: ir.Value, update: ir.Value, write_indices: ir.Value) -> ir.Value:
    return op.TensorScatter(cache, update, op.Cast(write_indices, to=ir.DataType.INT64), axis=-2, mode="linear")
