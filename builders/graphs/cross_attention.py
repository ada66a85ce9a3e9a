"""The decoder's gated cross-attention blocks. Their attention has two forms: each backend passes the form that it runs.

B sequences, S new tokens, N cross-attended tokens, D = head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import onnx_ir as ir

from nvlm_trt.builders.graphs.common import INT32, Shape, StageGraph
from nvlm_trt.builders.graphs.tensorrt_functions import DECOMPOSABLE, masked_trt_attention
from nvlm_trt.model.config import LlmConfig, NvlmConfig
from nvlm_trt.plugins.gated_cross_attention.onnx_function import PLUGIN_ATTRIBUTES, gated_cross_attention


class CrossAttention(ABC):
    """One form, for all blocks of one graph."""

    def __init__(self, graph: StageGraph, llm: LlmConfig, ranges: ir.Value, key: ir.Value) -> None:
        """Build the nodes that all blocks share, from ranges [B, S, 2] and any block's keys [B, kv_heads, N, D]."""
        self.ranges = ranges

    @abstractmethod
    def attend(self, graph: StageGraph, query: ir.Value, key: ir.Value, value: ir.Value, gate: ir.Value) -> ir.Value:
        """Attend with the queries of one block, in `graph` (the graph of this form, or a branch of it).

        query [B, heads, S, D]; key, value [B, kv_heads, N, D]; gate [1] -> tanh(gate) * attention [B, heads, S, D],
        zeros for an empty range."""


class GatedFunction(CrossAttention):
    """nvlm::GatedCrossAttention: a plugin for TensorRT, for other runtimes a function that they inline.

    The function copies the keys and values up to the longest range, and attends to these only. So many are a value of
    cross_ranges, on which shapes in the function depend."""

    def __init__(self, graph: StageGraph, llm: LlmConfig, ranges: ir.Value, key: ir.Value) -> None:
        super().__init__(graph, llm, ranges, key)
        self.function = gated_cross_attention(graph.opset)

    def attend(self, graph: StageGraph, query: ir.Value, key: ir.Value, value: ir.Value, gate: ir.Value) -> ir.Value:
        return graph.call(self.function, query, key, value, self.ranges, gate, **PLUGIN_ATTRIBUTES)


class MaskedAttention(CrossAttention):
    """TRT_Attention with a mask, over the whole capacity N of the cache: no shape depends on a value.

    For a TensorRT that has no plugin. What no range reaches is multiplied by zero, so it has to be finite."""

    def __init__(self, graph: StageGraph, llm: LlmConfig, ranges: ir.Value, key: ir.Value) -> None:
        super().__init__(graph, llm, ranges, key)
        op = graph.op
        self.attention = masked_trt_attention(graph.opset)
        self.scale = graph.float_constant("cross_attention_scale", llm.head_dim**-0.5)
        # The axis of heads comes first. TensorRT-RTX 1.7.1 fails to build bf16 plans with a mask [B, S, N] that gets it
        # last, if the largest S is 64 or less.
        start, end = op.Split(op.Unsqueeze(ranges, [1]), axis=-1, num_outputs=2, _outputs=2)  # [B, 1, S, 1] each
        zero, one = (op.Constant(value=ir.tensor(np.int32(number))) for number in (0, 1))
        capacity = op.Cast(op.Squeeze(op.Shape(key, start=2, end=3)), to=INT32)
        positions = op.Range(zero, capacity, one)  # [N]
        self.mask = op.And(op.GreaterOrEqual(positions, start), op.Less(positions, end))  # [B, 1, S, N]
        self.seen = op.Less(start, end)  # [B, 1, S, 1]

    def attend(self, graph: StageGraph, query: ir.Value, key: ir.Value, value: ir.Value, gate: ir.Value) -> ir.Value:
        op = graph.op
        y = graph.call(self.attention, op.Mul(query, self.scale), key, value, self.mask, **DECOMPOSABLE)
        # A fully masked row of attention is zero, uniform or NaN, depending on the implementation.
        y = op.Where(self.seen, y, op.CastLike(op.Constant(value_float=0.0), y))
        return op.Mul(y, op.Tanh(gate))


class CrossAttentionBlocks:
    """Builds Flamingo's gated blocks. A block leaves a token whose range is empty unchanged, bit for bit."""

    def __init__(
        self, graph: StageGraph, config: NvlmConfig, form: type[CrossAttention], skip_when_unused: bool
    ) -> None:
        assert config.cross_attention is not None
        op = graph.op
        self.graph, self.llm, self.cross, self.form = graph, config.llm, config.cross_attention, form
        self.ranges = graph.input("cross_ranges", INT32, ["batch", "sequence", 2])
        start, end = op.Split(self.ranges, axis=-1, num_outputs=2, _outputs=2)
        self.seen = op.Less(start, end)  # [B, S, 1]
        longest = op.ReduceMax(op.Sub(end, start), keepdims=0)
        self.used = op.Greater(longest, op.Constant(value=ir.tensor(np.int32(0)))) if skip_when_unused else None
        self.attention: CrossAttention | None = None

    def block(self, x: ir.Value, j: int) -> ir.Value:
        """Apply block j to x [B, S, hidden]."""
        shape: Shape = ["batch", self.llm.num_kv_heads, "cross_tokens", self.llm.head_dim]
        key = self.graph.input(f"cross_key.{j}", self.graph.dtype, shape)
        value = self.graph.input(f"cross_value.{j}", self.graph.dtype, shape)
        # in the main graph, where the branches of all blocks see the nodes
        attention = self.attention = self.attention or self.form(self.graph, self.llm, self.ranges, key)
        with self.graph.scope(f"cross_layers.{j}"):
            if self.used is None:
                return self._block(self.graph, attention, x, key, value, j)
            return self.graph.when(
                self.used, lambda graph: self._block(graph, attention, x, key, value, j), otherwise=x
            )

    def _block(
        self, graph: StageGraph, attention: CrossAttention, x: ir.Value, key: ir.Value, value: ir.Value, j: int
    ) -> ir.Value:
        op, llm = graph.op, self.llm
        name = f"language_model.cross_layers.{j}"
        query = graph.linear(graph.rms_norm(x, f"{name}.input_layernorm", llm.norm_eps), f"{name}.attn.q_proj")
        query = graph.split_heads(query, llm.num_heads, llm.head_dim)
        if self.cross.qk_norm:
            query = graph.rms_norm(query, f"{name}.attn.q_norm", llm.norm_eps)
        gate = graph.weight(f"{name}.attn_gate")
        y = attention.attend(graph, query, key, value, gate)
        y = graph.linear(graph.merge_heads(y, llm.num_heads * llm.head_dim), f"{name}.attn.o_proj")
        y = op.Add(x, y)
        if self.cross.ffn:
            ffn = graph.swiglu(graph.rms_norm(y, f"{name}.post_attention_layernorm", llm.norm_eps), f"{name}.mlp")
            y = op.Add(y, op.Mul(ffn, op.Tanh(graph.weight(f"{name}.mlp_gate"))))
        return op.Where(self.seen, y, x)
