"""Makes nvlm::GatedCrossAttention a model-local ONNX function, which ONNX Runtime inlines.

TensorRT's ONNX parser takes a node with PLUGIN_ATTRIBUTES as the plugin of the same name instead.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import build_function

from nvlm_trt.plugins.gated_cross_attention import KEY_BLOCK

DOMAIN = "nvlm"
NAME = "GatedCrossAttention"

# TensorRT's parser looks for these attributes on a node before it looks at functions. The namespace counts the kernel's
# versions: a timing cache knows a plugin by its name alone, and tensorrt.plugin registers every plugin as version "1".
PLUGIN_ATTRIBUTES: dict[str, str | int] = {"plugin_namespace": "nvlm_v1", "plugin_version": "1", "aot": 1}


def gated_cross_attention(opset: int) -> ir.Function:
    """Make (query [B, H, S, D], key [B, KV, N, D], value [B, KV, N, D], cross_ranges [B, S, 2] int32, gate [1])
    -> tanh(gate) * attention [B, H, S, D].

    Token s of sequence b reads the keys start <= n < end with (start, end) = cross_ranges[b, s]; an empty range gives
    exactly zero. Query head h reads key head h // (H / KV); the scale is D ** -0.5.

    `opset` (23 or later) is the opset of the calling graph."""
    types = {"plugin_namespace": ir.AttributeType.STRING, "plugin_version": ir.AttributeType.STRING}
    attributes = {
        name: ir.Attr(name, types.get(name, ir.AttributeType.INT), None)  # None: a parameter without default
        for name in PLUGIN_ATTRIBUTES
    }
    inputs = [ir.Value(name=name) for name in ("query", "key", "value", "cross_ranges", "gate")]
    return build_function(_body, inputs, domain=DOMAIN, name=NAME, attributes=attributes, opset_imports={"": opset})


def _body(op: Any, query: ir.Value, key: ir.Value, value: ir.Value, cross_ranges: ir.Value, gate: ir.Value) -> ir.Value:
    zero, one, two, block = (op.Constant(value_ints=[number]) for number in (0, 1, 2, KEY_BLOCK))
    ranges = op.Cast(cross_ranges, to=ir.DataType.INT64)
    start, end = op.Split(ranges, axis=-1, num_outputs=2, _outputs=2)  # [B, S, 1] each
    # N is the cache's capacity. Copying the used keys costs less than attending to the unused keys: 0.7 ms against
    # 2.3 ms for one token and 35 against 140 for 256, at 1792 of 7168 keys, 14 / 2 heads of 64, 2 cores.
    # Attention over no keys at all is undefined, so one block stays.
    longest = op.Reshape(op.ReduceMax(ranges, keepdims=0), one)
    blocks = op.Add(op.Div(op.Sub(longest, one), block), one)
    used = op.Min(op.Mul(blocks, block), op.Shape(key, start=2, end=3))  # [1]
    key = op.Slice(key, zero, used, two)  # [B, KV, used, D]
    value = op.Slice(value, zero, used, two)
    positions = op.Range(op.Constant(value_int=0), op.Squeeze(used), op.Constant(value_int=1))
    visible = op.And(op.GreaterOrEqual(positions, start), op.Less(positions, end))  # [B, S, used]
    attention = op.Attention(query, key, value, op.Unsqueeze(visible, one))  # [B, H, S, D]
    # A fully masked row of Attention is zero, uniform or NaN, depending on the implementation.
    seen = op.Unsqueeze(op.Less(start, end), one)  # [B, 1, S, 1]
    attention = op.Where(seen, attention, op.CastLike(op.Constant(value_float=0.0), attention))
    return op.Mul(attention, op.Tanh(gate))
