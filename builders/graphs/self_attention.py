"""Builds the decoder's self-attention over a KV cache, in three forms. Each backend passes the form that it runs.

The attributes of a form say which operators the rest of the decoder may use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from nvlm_trt.builders.graphs.common import CACHE_OPSET, INT32, OPSET, StageGraph
from nvlm_trt.builders.graphs.tensorrt_functions import CAUSAL, causal_trt_attention, trt_cache_update
from nvlm_trt.model.config import LlmConfig


class SelfAttention(ABC):
    """Builds the self-attention of all layers of one graph in one form."""

    opset: ClassVar[int] = CACHE_OPSET
    # Whether shapes in the decoder may depend on values. A CUDA graph needs shapes that follow from the inputs' shapes.
    value_dependent_shapes: ClassVar[bool] = True
    # Whether cross-attention blocks may stand in an If, which skips the blocks that no token of a batch needs. TensorRT
    # takes plugins in the main graph only, so a portable graph has the blocks there.
    skippable_blocks: ClassVar[bool] = False

    # Whether logit_index names several tokens of each sequence, [B, R]: a step can check R drafted tokens.
    several_logits: ClassVar[bool] = False

    def __init__(
        self, graph: StageGraph, llm: LlmConfig, input_ids: ir.Value, write_indices: ir.Value, max_seq_len: int
    ) -> None:
        """Build the nodes that all layers share, from input_ids [B, S] and write_indices [B]."""
        self.graph, self.llm = graph, llm
        self.cos, self.sin = _rope_tables(graph, llm, max_seq_len)

    @abstractmethod
    def attend(self, qkv: ir.Value, past_key: ir.Value, past_value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Attend causally with the new tokens of one layer.

        qkv [B, S, (heads + 2 * kv_heads) * head_dim]; past_key, past_value [B, kv_heads, L, head_dim]
        -> (output [B, S, heads * head_dim], updated key cache, updated value cache)."""


class StandardAttention(SelfAttention):
    """Uses RotaryEmbedding, TensorScatter and Attention of opset 24: portable."""

    def __init__(
        self, graph: StageGraph, llm: LlmConfig, input_ids: ir.Value, write_indices: ir.Value, max_seq_len: int
    ) -> None:
        super().__init__(graph, llm, input_ids, write_indices, max_seq_len)
        op = graph.op
        self.write_indices = write_indices
        tokens = op.Shape(input_ids, start=1, end=2)  # [1]
        offsets = op.Range(0, op.Squeeze(tokens), 1)
        self.positions = op.Add(op.Unsqueeze(write_indices, [1]), offsets)  # [B, S]
        self.cached = op.Add(write_indices, tokens)  # [B], the new tokens included

    def attend(self, qkv: ir.Value, past_key: ir.Value, past_value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        op = self.graph.op
        query, key, value = self._project(qkv)
        key = op.TensorScatter(past_key, key, self.write_indices, axis=2, mode="linear")
        value = op.TensorScatter(past_value, value, self.write_indices, axis=2, mode="linear")
        y = op.Attention(query, key, value, None, None, None, self.cached, is_causal=1)
        return self.graph.merge_heads(y, self.llm.num_heads * self.llm.head_dim), key, value

    def _project(self, qkv: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Split [B, S, (heads + 2 * kv_heads) * head_dim] into query, key and value, [B, heads, S, head_dim] each.

        Query and key are rotated."""
        graph, llm = self.graph, self.llm
        width, kv_width = llm.num_heads * llm.head_dim, llm.num_kv_heads * llm.head_dim
        query, key, value = graph.op.Split(qkv, [width, kv_width, kv_width], axis=-1, _outputs=3)
        query = self._rotate(graph.split_heads(query, llm.num_heads, llm.head_dim))
        key = self._rotate(graph.split_heads(key, llm.num_kv_heads, llm.head_dim))
        return query, key, graph.split_heads(value, llm.num_kv_heads, llm.head_dim)

    def _rotate(self, x: ir.Value) -> ir.Value:
        return self.graph.op.RotaryEmbedding(x, self.cos, self.sin, self.positions)


class TensorRtAttention(StandardAttention):
    """Uses RotaryEmbedding, TRT_KVCacheUpdate and TRT_Attention.

    TensorRT aligns the standard Attention's causal mask to the upper left corner, and ignores how much of the cache is
    in use."""

    value_dependent_shapes = False

    def __init__(
        self, graph: StageGraph, llm: LlmConfig, input_ids: ir.Value, write_indices: ir.Value, max_seq_len: int
    ) -> None:
        super().__init__(graph, llm, input_ids, write_indices, max_seq_len)
        self.attention, self.update = causal_trt_attention(graph.opset), trt_cache_update(graph.opset)
        self.scale = graph.float_constant("attention_scale", llm.head_dim**-0.5)
        self.first = graph.op.Cast(write_indices, to=INT32)
        self.lengths = graph.op.Cast(self.cached, to=INT32)

    def attend(self, qkv: ir.Value, past_key: ir.Value, past_value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        graph = self.graph
        query, key, value = self._project(qkv)
        key = graph.call(self.update, past_key, key, self.first)
        value = graph.call(self.update, past_value, value, self.first)
        query = graph.op.Mul(query, self.scale)
        y = graph.call(self.attention, query, key, value, None, None, self.lengths, **CAUSAL)
        return graph.merge_heads(y, self.llm.num_heads * self.llm.head_dim), key, value


class GroupQueryAttention(SelfAttention):
    """Uses com.microsoft.GroupQueryAttention of ONNX Runtime, which rotates, writes the cache and attends in one node.

    The cost follows the tokens in use, not L. A batch of several new tokens per sequence needs sequences of equal
    length with nothing cached, or a single sequence."""

    opset = OPSET
    skippable_blocks = True
    several_logits = True

    def __init__(
        self, graph: StageGraph, llm: LlmConfig, input_ids: ir.Value, write_indices: ir.Value, max_seq_len: int
    ) -> None:
        super().__init__(graph, llm, input_ids, write_indices, max_seq_len)
        op = graph.op
        cached = op.Add(write_indices, op.Shape(input_ids, start=1, end=2))  # [B], the new tokens included
        self.last_position = op.Cast(op.Sub(cached, 1), to=INT32)
        self.longest = op.Cast(op.ReduceMax(cached, keepdims=0), to=INT32)

    def attend(self, qkv: ir.Value, past_key: ir.Value, past_value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        return self.graph.microsoft.GroupQueryAttention(
            *(qkv, None, None, past_key, past_value, self.last_position, self.longest, self.cos, self.sin),
            num_heads=self.llm.num_heads,
            kv_num_heads=self.llm.num_kv_heads,
            do_rotary=1,
            _outputs=3,
        )


def _rope_tables(graph: StageGraph, llm: LlmConfig, max_seq_len: int) -> tuple[ir.Value, ir.Value]:
    """Return cos and sin [L, head_dim / 2] of position * theta ** (-2 i / head_dim), from float64, rounded once."""
    frequencies = llm.rope_theta ** (-np.arange(0, llm.head_dim, 2) / llm.head_dim)
    angles = np.arange(max_seq_len)[:, None] * frequencies
    return graph.float_constant("rope_cos", np.cos(angles)), graph.float_constant("rope_sin", np.sin(angles))
