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
from nvlm_trt.builders.graphs.tensorrt_functions import CAUSAL, causal_trt_attention, trt_cache_update
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.config import LlmConfig, NvlmConfig
from nvlm_trt.model.layout import EMBEDDING
from nvlm_trt.plugins.gated_cross_attention.onnx_function import PLUGIN_ATTRIBUTES, gated_cross_attention

DecoderAttention = Literal["standard", "gqa", "tensorrt"]


def decoder_graph(
    config: NvlmConfig,
    weights: WeightSource,
    limits: EngineLimits,
    weight_format: WeightFormat | None = None,
    attention: DecoderAttention = "standard",
    skip_unused_blocks: bool = True,
    dtype: ir.DataType = FLOAT,
) -> ir.Model:
    """Build the graph. `attention`: "standard" is portable; "tensorrt" is TensorRT's operators; "gqa" is ONNX Runtime's
    GroupQueryAttention, whose cost follows the tokens in use instead of L. Several sequences of several new tokens each
    must then be of equal length with nothing cached, or a single sequence. "gqa" also skips cross-attention blocks that
    no token of a batch needs, if `skip_unused_blocks`.

    `dtype` of weights, image tokens and caches; logits are float32. In the form "tensorrt", image_tokens has at least
    one row, which nothing reads where there is no image token."""
    opset = OPSET if attention == "gqa" else CACHE_OPSET
    graph = StageGraph("decoder", weights, weight_format, opset, dtype)
    llm = config.llm
    input_ids = graph.input("input_ids", INT64, ["batch", "sequence"])
    image_tokens = graph.input("image_tokens", dtype, ["image_tokens", llm.hidden_size])
    write_indices = graph.input("write_indices", INT64, ["batch"])
    logit_index = graph.input("logit_index", INT64, ["batch"])
    forms: dict[str, type[_StandardAttention | _GroupQueryAttention]] = {
        "standard": _StandardAttention,
        "gqa": _GroupQueryAttention,
        "tensorrt": _TensorRtAttention,
    }
    self_attention: _SelfAttention = forms[attention](graph, llm, input_ids, write_indices, limits.max_seq_len)
    skip_when_unused = skip_unused_blocks and attention == "gqa"
    cross = _CrossAttention(graph, config, skip_when_unused) if config.cross_layers else None

    embedding = graph.embedding(EMBEDDING)
    embed = _embed_by_position if attention == "tensorrt" else _embed
    x = embed(graph, config, embedding.table, input_ids, image_tokens)  # [B, S, hidden]
    for i in range(llm.num_layers):
        with graph.scope(f"layers.{i}"):
            if cross is not None and i in config.cross_layers:
                x = cross.block(x, config.cross_layers.index(i))
            x = _layer(graph, llm, x, i, limits.max_seq_len, self_attention)
    x = graph.op.GatherND(x, graph.op.Unsqueeze(logit_index, [1]), batch_dims=1)  # [B, hidden]
    x = graph.rms_norm(x, "language_model.model.norm", llm.norm_eps)
    tied = llm.tie_word_embeddings
    logits = graph.tied_linear(x, embedding) if tied else graph.linear(x, "language_model.lm_head")
    if dtype != FLOAT:
        logits = graph.op.Cast(logits, to=FLOAT)
    logits.dtype = FLOAT
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


def _embed_by_position(
    graph: StageGraph, config: NvlmConfig, table: ir.Value, input_ids: ir.Value, image_tokens: ir.Value
) -> ir.Value:
    """As `_embed`, in operators whose shapes do not depend on values: those TensorRT records into a CUDA graph."""
    op = graph.op
    is_image = op.Equal(input_ids, config.image_token_id)  # [B, S]
    # TensorRT's CumSum takes floating-point numbers only; float32 counts to 2 ** 24.
    counted = op.CumSum(op.Cast(op.Reshape(is_image, [-1]), to=FLOAT), graph.constant("token_axis", np.array(0)))
    rows = op.Max(op.Sub(op.Reshape(op.Cast(counted, to=INT64), op.Shape(input_ids)), 1), 0)  # [B, S]
    return op.Where(op.Unsqueeze(is_image, [2]), op.Gather(image_tokens, rows), op.Gather(table, input_ids))


def _layer(
    graph: StageGraph, llm: LlmConfig, x: ir.Value, i: int, max_seq_len: int, attention: _SelfAttention
) -> ir.Value:
    op = graph.op
    name = f"language_model.model.layers.{i}"
    cache_shape: Shape = ["batch", llm.num_kv_heads, max_seq_len, llm.head_dim]
    past_key = graph.input(f"past_key.{i}", graph.dtype, cache_shape)
    past_value = graph.input(f"past_value.{i}", graph.dtype, cache_shape)
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
        op = self.graph.op
        query, key, value = self._project(qkv)
        key = op.TensorScatter(past_key, key, self.write_indices, axis=2, mode="linear")
        value = op.TensorScatter(past_value, value, self.write_indices, axis=2, mode="linear")
        y = op.Attention(query, key, value, None, None, None, self.cached, is_causal=1)
        return self.graph.merge_heads(y, self.llm.num_heads * self.llm.head_dim), key, value

    def _project(self, qkv: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """[B, S, (heads + 2 * kv_heads) * head_dim] -> rotated query and key, value: [B, heads, S, head_dim] each."""
        graph, llm = self.graph, self.llm
        width, kv_width = llm.num_heads * llm.head_dim, llm.num_kv_heads * llm.head_dim
        query, key, value = graph.op.Split(qkv, [width, kv_width, kv_width], axis=-1, _outputs=3)
        query = self._rotate(graph.split_heads(query, llm.num_heads, llm.head_dim))
        key = self._rotate(graph.split_heads(key, llm.num_kv_heads, llm.head_dim))
        return query, key, graph.split_heads(value, llm.num_kv_heads, llm.head_dim)

    def _rotate(self, x: ir.Value) -> ir.Value:
        return self.graph.op.RotaryEmbedding(x, self.cos, self.sin, self.positions)


class _TensorRtAttention(_StandardAttention):
    """RotaryEmbedding, TRT_KVCacheUpdate and TRT_Attention. Standard Attention is causal from the upper left corner
    in TensorRT, and does not look at how much of the cache is in use."""

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
    return graph.float_constant("rope_cos", np.cos(angles)), graph.float_constant("rope_sin", np.sin(angles))


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
        key = self.graph.input(f"cross_key.{j}", self.graph.dtype, shape)
        value = self.graph.input(f"cross_value.{j}", self.graph.dtype, shape)
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
