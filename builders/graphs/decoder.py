"""Builds the graph decoder: the LLM over a KV cache, with the gated cross-attention blocks of NVLM-X and NVLM-H.

B sequences, S new tokens, L = max_seq_len, N cross-attended tokens, hd = head_dim:

    input_ids [B, S], write_indices [B] (tokens cached before), logit_index [B] (the row whose logits are wanted)
        or, in a form with several logits, logit_index [B, R]
    image_tokens [M, hidden]: the image embeddings, which replace the image placeholders of input_ids in order
    past_key.{i}, past_value.{i} [B, kv_heads, L, hd]
    cross_key.{j}, cross_value.{j} [B, kv_heads, N, hd], cross_ranges [B, S, 2] int32   (X, H)
    -> logits [B, vocab] or [B * R, vocab]
       present_key.{i}, present_value.{i}: the caches, to be bound to the memory of past_*
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from nvlm_trt.builders.graphs.common import (
    FLOAT,
    HIDDEN,
    HIDDEN_OUT,
    INT64,
    Shape,
    StageGraph,
    WeightFormat,
    WeightSource,
)
from nvlm_trt.builders.graphs.cross_attention import CrossAttention, CrossAttentionBlocks, GatedFunction
from nvlm_trt.builders.graphs.self_attention import SelfAttention, StandardAttention
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.config import LlmConfig, NvlmConfig
from nvlm_trt.model.layout import EMBEDDING, LM_HEAD


def decoder_graph(
    config: NvlmConfig,
    weights: WeightSource,
    limits: EngineLimits,
    weight_format: WeightFormat | None = None,
    attention: type[SelfAttention] = StandardAttention,
    cross_attention: type[CrossAttention] = GatedFunction,
    skip_unused: bool = True,
    dtype: ir.DataType = FLOAT,
) -> ir.Model:
    """Build the graph with self-attention in the form `attention`, which also decides the operators around it, and with
    the attention of cross-attention blocks in the form `cross_attention`.

    `skip_unused`: skip cross-attention blocks that no token of a batch needs, and the rest of the last layer behind its
    attention for tokens whose logits are not wanted, in the forms that allow it.
    `dtype`: for weights, image_tokens and caches; logits are float32. In a form without value-dependent shapes,
    image_tokens has at least one row, which nothing reads if input_ids has no image placeholder."""
    graph = StageGraph("decoder", weights, weight_format, attention.opset, dtype)
    llm = config.llm
    input_ids = graph.input("input_ids", INT64, ["batch", "sequence"])
    image_tokens = graph.input("image_tokens", dtype, ["image_tokens", llm.hidden_size])
    write_indices = graph.input("write_indices", INT64, ["batch"])
    several = attention.several_logits
    logit_index = graph.input("logit_index", INT64, ["batch", "logits"] if several else ["batch"])
    self_attention = attention(graph, llm, input_ids, write_indices, limits.max_seq_len)
    skip_when_unused = skip_unused and attention.skippable_blocks
    cross = CrossAttentionBlocks(graph, config, cross_attention, skip_when_unused) if config.cross_layers else None

    embedding = graph.embedding(EMBEDDING)
    embed = _embed if attention.value_dependent_shapes else _embed_by_position
    x = embed(graph, config, embedding.table, input_ids, image_tokens)  # [B, S, hidden]
    for i in range(llm.num_layers):
        wanted = logit_index if several and skip_unused and i == llm.num_layers - 1 else None
        x = _layer(graph, config, x, i, limits.max_seq_len, self_attention, cross, wanted)
    if not (several and skip_unused):
        x = _tokens(graph, x, logit_index)
    if several:
        x = graph.op.Reshape(x, [-1, llm.hidden_size])  # [B * R, hidden]
    x = _final_norm(graph, llm, x)
    logits = graph.tied_linear(x, embedding) if llm.tie_word_embeddings else graph.linear(x, "language_model.lm_head")
    if dtype != FLOAT:
        logits = graph.op.Cast(logits, to=FLOAT)
    logits.dtype = FLOAT
    graph.output(logits, "logits", ["rows" if several else "batch", llm.vocab_size])
    return graph.model()


def decoder_layer_graph(
    config: NvlmConfig,
    weights: WeightSource,
    limits: EngineLimits,
    weight_format: WeightFormat,
    i: int,
    attention: type[SelfAttention],
    cross_attention: type[CrossAttention] = GatedFunction,
) -> ir.Model:
    """Build layer i, with the gated block before it: hidden [B, S, hidden] -> hidden_out. The other inputs and outputs
    are those of the whole graph."""
    graph = StageGraph("decoder_layer", weights, weight_format, attention.opset)
    shape: Shape = ["batch", "sequence", config.llm.hidden_size]
    x = graph.input(HIDDEN, FLOAT, shape)
    write_indices = graph.input("write_indices", INT64, ["batch"])
    # a form of attention takes B and S from the tensor that it gets as input_ids
    self_attention = attention(graph, config.llm, x, write_indices, limits.max_seq_len)
    has_block = i in config.cross_layers
    cross = CrossAttentionBlocks(graph, config, cross_attention, skip_when_unused=False) if has_block else None
    x = _layer(graph, config, x, i, limits.max_seq_len, self_attention, cross)
    graph.output(x, HIDDEN_OUT, shape)
    return graph.model()


def head_graph(config: NvlmConfig, weights: WeightSource, weight_format: WeightFormat) -> ir.Model:
    """Build the part behind the layers: hidden [rows, hidden] -> nothing but what `weight_format` reports of lm_head's
    input."""
    graph = StageGraph("head", weights, weight_format)
    x = graph.input(HIDDEN, FLOAT, ["rows", config.llm.hidden_size])
    weight = EMBEDDING if config.llm.tie_word_embeddings else LM_HEAD
    graph.linear(_final_norm(graph, config.llm, x), weight.removesuffix(".weight"))
    return graph.model()


def _embed(
    graph: StageGraph, config: NvlmConfig, table: ir.Value, input_ids: ir.Value, image_tokens: ir.Value
) -> ir.Value:
    """Return text embeddings [B, S, hidden], image_tokens [M, hidden] in place of the image placeholders, in order."""
    op = graph.op
    assert config.image_token_id is not None, "read_config finds the id of the image placeholder"
    places = op.Transpose(op.NonZero(op.Equal(input_ids, config.image_token_id)), perm=[1, 0])  # [M, 2]
    return op.ScatterND(op.Gather(table, input_ids), places, image_tokens)


def _embed_by_position(
    graph: StageGraph, config: NvlmConfig, table: ir.Value, input_ids: ir.Value, image_tokens: ir.Value
) -> ir.Value:
    """Compute what `_embed` does, in operators whose shapes do not depend on values."""
    op = graph.op
    is_image = op.Equal(input_ids, config.image_token_id)  # [B, S]
    # TensorRT's CumSum takes floating-point numbers only; float32 counts to 2 ** 24.
    counted = op.CumSum(op.Cast(op.Reshape(is_image, [-1]), to=FLOAT), graph.constant("token_axis", np.array(0)))
    rows = op.Max(op.Sub(op.Reshape(op.Cast(counted, to=INT64), op.Shape(input_ids)), 1), 0)  # [B, S]
    return op.Where(op.Unsqueeze(is_image, [2]), op.Gather(image_tokens, rows), op.Gather(table, input_ids))


def _layer(
    graph: StageGraph,
    config: NvlmConfig,
    x: ir.Value,
    i: int,
    max_seq_len: int,
    attention: SelfAttention,
    cross: CrossAttentionBlocks | None,
    wanted: ir.Value | None = None,
) -> ir.Value:
    """Apply layer i to x [B, S, hidden], and before it the gated block, if the layer has one. Return all tokens, or the
    tokens `wanted` [B, R] alone: [B, R, hidden]."""
    with graph.scope(f"layers.{i}"):
        if cross is not None and i in config.cross_layers:
            x = cross.block(x, config.cross_layers.index(i))
        return _self_attention_and_ffn(graph, config.llm, x, i, max_seq_len, attention, wanted)


def _self_attention_and_ffn(
    graph: StageGraph,
    llm: LlmConfig,
    x: ir.Value,
    i: int,
    max_seq_len: int,
    attention: SelfAttention,
    wanted: ir.Value | None,
) -> ir.Value:
    """Apply layer i to x [B, S, hidden], and return all tokens, or the tokens `wanted` [B, R] alone: [B, R, hidden]."""
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
    if wanted is not None:
        x, y = _tokens(graph, x, wanted), _tokens(graph, y, wanted)
    x = op.Add(x, graph.linear(y, f"{name}.self_attn.o_proj"))
    return op.Add(x, graph.swiglu(graph.rms_norm(x, f"{name}.post_attention_layernorm", llm.norm_eps), f"{name}.mlp"))


def _tokens(graph: StageGraph, x: ir.Value, wanted: ir.Value) -> ir.Value:
    """Return the tokens `wanted` [B, R] or [B] of x [B, S, width]: [B, R, width] or [B, width]."""
    return graph.op.GatherND(x, graph.op.Unsqueeze(wanted, [-1]), batch_dims=1)


def _final_norm(graph: StageGraph, llm: LlmConfig, x: ir.Value) -> ir.Value:
    return graph.rms_norm(x, "language_model.model.norm", llm.norm_eps)
