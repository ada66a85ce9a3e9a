"""decoder: the LLM over a KV cache, with NVLM-X's and -H's gated cross-attention blocks.

B sequences, S new tokens, L = max_seq_len, N cross-attended tokens, hd = head_dim:

    input_ids [B, S], write_indices [B] (tokens cached before), logit_index [B] (the row whose logits are wanted)
    image_tokens [M, hidden]: replace the embeddings where input_ids is the image token, in order
    past_key.{i}, past_value.{i} [B, kv_heads, L, hd]
    cross_key.{j}, cross_value.{j} [B, kv_heads, N, hd], cross_ranges [B, S, 2] int32   (X, H)
    -> logits [B, vocab], present_key.{i}, present_value.{i}: the caches, to be bound to the memory of past_*
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
import onnx_ir as ir

from nvlm_trt.builders.graphs.common import (
    CACHE_OPSET,
    FLOAT,
    INT32,
    INT64,
    OPSET,
    Shape,
    StageGraph,
    WeightFormat,
    WeightSource,
)
from nvlm_trt.config import LlmConfig, NvlmConfig
from nvlm_trt.engine import EngineLimits
from nvlm_trt.layout import EMBEDDING
from nvlm_trt.plugins.gated_cross_attention.onnx_function import PLUGIN_ATTRIBUTES, gated_cross_attention

DecoderAttention = Literal["standard", "gqa"]


def decoder_graph(
    config: NvlmConfig,
    weights: WeightSource,
    limits: EngineLimits,
    weight_format: WeightFormat | None = None,
    attention: DecoderAttention = "standard",
    skip_unused_blocks: bool = True,
) -> ir.Model:
    """Build the graph. `attention`: "standard" is portable; "gqa" is ONNX Runtime's GroupQueryAttention, whose cost
    follows the tokens in use instead of L. Several sequences of several new tokens each must then be of equal length
    with nothing cached, or a single sequence. "gqa" also skips cross-attention blocks that no token of a batch needs,
    if `skip_unused_blocks`."""
    opset = CACHE_OPSET if attention == "standard" else OPSET
    graph = StageGraph("decoder", weights, weight_format, opset)
    llm = config.llm
    input_ids = graph.input("input_ids", INT64, ["batch", "sequence"])
    image_tokens = graph.input("image_tokens", FLOAT, ["image_tokens", llm.hidden_size])
    write_indices = graph.input("write_indices", INT64, ["batch"])
    logit_index = graph.input("logit_index", INT64, ["batch"])
    form = _GroupQueryAttention if attention == "gqa" else _StandardAttention
    self_attention: _SelfAttention = form(graph, llm, input_ids, write_indices, limits.max_seq_len)
    skip_when_unused = skip_unused_blocks and attention == "gqa"
    cross = _CrossAttention(graph, config, skip_when_unused) if config.cross_layers else None

    embedding = graph.embedding(EMBEDDING)
    x = _embed(graph, config, embedding.table, input_ids, image_tokens)  # [B, S, hidden]
    for i in range(llm.num_layers):
        with graph.scope(f"layers.{i}"):
            if cross is not None and i in config.cross_layers:
                x = cross.block(x, config.cross_layers.index(i))
            x = _layer(graph, llm, x, i, limits.max_seq_len, self_attention)
    x = graph.op.GatherND(x, graph.op.Unsqueeze(logit_index, [1]), batch_dims=1)  # [B, hidden]
    x = graph.rms_norm(x, "language_model.model.norm", llm.norm_eps)
    tied = llm.tie_word_embeddings
    logits = graph.tied_linear(x, embedding) if tied else graph.linear(x, "language_model.lm_head")
    graph.output(logits, "logits", ["batch", llm.vocab_size])
    return graph.model()


def _embed(
    graph: StageGraph, config: NvlmConfig, table: ir.Value, input_ids: ir.Value, image_tokens: ir.Value
) -> ir.Value:
    """Text embeddings [B, S, hidden] with `image_tokens` [M, hidden] in the places of the image token, in order."""
    op = graph.op
    assert config.image_token_id is not None, "read_config finds the image token's id"
    places = op.Transpose(op.NonZero(op.Equal(input_ids, config.image_token_id)), perm=[1, 0])  # [M, 2]
    return op.ScatterND(op.Gather(table, input_ids), places, image_tokens)


def _layer(
    graph: StageGraph, llm: LlmConfig, x: ir.Value, i: int, max_seq_len: int, attention: _SelfAttention
) -> ir.Value:
    op = graph.op
    name = f"language_model.model.layers.{i}"
    cache_shape: Shape = ["batch", llm.num_kv_heads, max_seq_len, llm.head_dim]
    past_key = graph.input(f"past_key.{i}", FLOAT, cache_shape)
    past_value = graph.input(f"past_value.{i}", FLOAT, cache_shape)
    parts = [f"{name}.self_attn.{part}_proj" for part in "qkv"]
    qkv = graph.linear(
        graph.rms_norm(x, f"{name}.input_layernorm", llm.norm_eps), f"{name}.self_attn.qkv_proj", parts, llm.qkv_bias
    )  # [B, S, (heads + 2 * kv_heads) * head_dim]
    y, key, value = attention.attend(qkv, past_key, past_value)  # y: [B, S, heads * head_dim]
    graph.output(key, f"present_key.{i}", cache_shape)
    graph.output(value, f"present_value.{i}", cache_shape)
    x = op.Add(x, graph.linear(y, f"{name}.self_attn.o_proj"))
    return op.Add(x, graph.swiglu(graph.rms_norm(x, f"{name}.post_attention_layernorm", llm.norm_eps), f"{name}.mlp"))


# --- self-attention ----------------------------------------------------------------------------------------------


class _SelfAttention(Protocol):
    def attend(self, qkv: ir.Value, past_key: ir.Value, past_value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Causal attention of the new tokens -> (output [B, S, heads * head_dim], updated key and value cache)."""
        ...


class _StandardAttention:
    """RotaryEmbedding, TensorScatter and Attention of opset 24."""

    def __init__(
        self, graph: StageGraph, llm: LlmConfig, input_ids: ir.Value, write_indices: ir.Value, max_seq_len: int
    ) -> None:
        op = graph.op
        self.graph, self.llm = graph, llm
        self.cos, self.sin = _rope_tables(graph, llm, max_seq_len)
        self.write_indices = write_indices
        tokens = op.Shape(input_ids, start=1, end=2)  # [1]
        offsets = op.Range(0, op.Squeeze(tokens), 1)
        self.positions = op.Add(op.Unsqueeze(write_indices, [1]), offsets)  # [B, S]
        self.cached = op.Add(write_indices, tokens)  # [B], the new tokens included

    def attend(self, qkv: ir.Value, past_key: ir.Value, past_value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        graph, llm, op = self.graph, self.llm, self.graph.op
        width, kv_width = llm.num_heads * llm.head_dim, llm.num_kv_heads * llm.head_dim
        query, key, value = op.Split(qkv, [width, kv_width, kv_width], axis=-1, _outputs=3)
        query = self._rotate(graph.split_heads(query, llm.num_heads, llm.head_dim))
        key = self._rotate(graph.split_heads(key, llm.num_kv_heads, llm.head_dim))
        value = graph.split_heads(value, llm.num_kv_heads, llm.head_dim)
        key = op.TensorScatter(past_key, key, self.write_indices, axis=2, mode="linear")
        value = op.TensorScatter(past_value, value, self.write_indices, axis=2, mode="linear")
        y = op.Attention(query, key, value, None, None, None, self.cached, is_causal=1)
        return graph.merge_heads(y, width), key, value

    def _rotate(self, x: ir.Value) -> ir.Value:
        return self.graph.op.RotaryEmbedding(x, self.cos, self.sin, self.positions)


class _GroupQueryAttention:
    """com.microsoft.GroupQueryAttention, which rotates, writes the cache and attends in one node."""

    def __init__(
        self, graph: StageGraph, llm: LlmConfig, input_ids: ir.Value, write_indices: ir.Value, max_seq_len: int
    ) -> None:
        op = graph.op
        self.graph, self.llm = graph, llm
        self.cos, self.sin = _rope_tables(graph, llm, max_seq_len)
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
    """cos and sin [L, head_dim / 2] of position * theta ** (-2 i / head_dim), in float64 until rounded once."""
    frequencies = llm.rope_theta ** (-np.arange(0, llm.head_dim, 2) / llm.head_dim)
    angles = np.arange(max_seq_len)[:, None] * frequencies
    cos = graph.constant("rope_cos", np.cos(angles).astype(np.float32))
    return cos, graph.constant("rope_sin", np.sin(angles).astype(np.float32))


# --- gated cross-attention ---------------------------------------------------------------------------------------


class _CrossAttention:
    """Flamingo's gated blocks. A token whose range is empty passes a block unchanged, bit for bit."""

    def __init__(self, graph: StageGraph, config: NvlmConfig, skip_when_unused: bool) -> None:
        assert config.cross_attention is not None
        op = graph.op
        self.graph, self.llm, self.cross = graph, config.llm, config.cross_attention
        self.function = gated_cross_attention(graph.opset)
        self.ranges = graph.input("cross_ranges", INT32, ["batch", "sequence", 2])
        start, end = op.Split(self.ranges, axis=-1, num_outputs=2, _outputs=2)
        self.seen = op.Less(start, end)  # [B, S, 1]
        # TensorRT takes plugins in the main graph only, so the portable form runs the blocks always.
        longest = op.ReduceMax(op.Sub(end, start), keepdims=0)
        self.used = op.Greater(longest, op.Constant(value=ir.tensor(np.int32(0)))) if skip_when_unused else None

    def block(self, x: ir.Value, j: int) -> ir.Value:
        """Block j on x [B, S, hidden]."""
        shape: Shape = ["batch", self.llm.num_kv_heads, "cross_tokens", self.llm.head_dim]
        key = self.graph.input(f"cross_key.{j}", FLOAT, shape)
        value = self.graph.input(f"cross_value.{j}", FLOAT, shape)
        with self.graph.scope(f"cross_layers.{j}"):
            if self.used is None:
                return self._block(self.graph, x, key, value, j)
            return self.graph.when(self.used, lambda graph: self._block(graph, x, key, value, j), otherwise=x)

    def _block(self, graph: StageGraph, x: ir.Value, key: ir.Value, value: ir.Value, j: int) -> ir.Value:
        op, llm = graph.op, self.llm
        name = f"language_model.cross_layers.{j}"
        query = graph.linear(graph.rms_norm(x, f"{name}.input_layernorm", llm.norm_eps), f"{name}.attn.q_proj")
        query = graph.split_heads(query, llm.num_heads, llm.head_dim)
        if self.cross.qk_norm:
            query = graph.rms_norm(query, f"{name}.attn.q_norm", llm.norm_eps)
        gate = graph.weight(f"{name}.attn_gate")
        y = graph.call(self.function, query, key, value, self.ranges, gate, **PLUGIN_ATTRIBUTES)
        y = graph.linear(graph.merge_heads(y, llm.num_heads * llm.head_dim), f"{name}.attn.o_proj")
        y = op.Add(x, y)
        if self.cross.ffn:
            ffn = graph.swiglu(graph.rms_norm(y, f"{name}.post_attention_layernorm", llm.norm_eps), f"{name}.mlp")
            y = op.Add(y, op.Mul(ffn, op.Tanh(graph.weight(f"{name}.mlp_gate"))))
        return op.Where(self.seen, y, x)
