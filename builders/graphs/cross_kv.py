"""cross_kv (NVLM-X, NVLM-H): image_tokens [n, T, hidden] -> cross_key.{j}, cross_value.{j} [kv_heads, C, head_dim].

The n tiles are those of one image, in order. NVLM-X: C = n * T. NVLM-H: C = n * (tag_length + T), because the tokens of
every tile follow the text embeddings of its tag. The graph holds these embeddings: an image always has tags 1 .. n.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.builders.graphs.common import FLOAT, StageGraph, WeightFormat, WeightSource
from nvlm_trt.model.config import NvlmConfig


def cross_kv_graph(
    config: NvlmConfig,
    weights: WeightSource,
    tag_embeddings: FloatArray | None,
    weight_format: WeightFormat | None = None,
    dtype: ir.DataType = FLOAT,
    blocks: Sequence[int] | None = None,
) -> ir.Model:
    """Build the graph, or the part of it for some `blocks`. `tag_embeddings`: [max_tiles, tag_length, hidden] of
    <tile_1> .. for NVLM-H, None for NVLM-X."""
    assert config.cross_attention is not None, "NVLM-D has no cross-attention"
    assert (tag_embeddings is not None) == (config.architecture == "H"), "only NVLM-H has tile tags in cross-attention"
    graph = StageGraph("cross_kv", weights, weight_format, dtype=dtype)
    llm = config.llm
    x = graph.input("image_tokens", dtype, ["tiles", config.tokens_per_tile, llm.hidden_size])
    if tag_embeddings is not None:
        tags = graph.float_constant("tag_embeddings", tag_embeddings)
        tiles = graph.op.Shape(x, start=0, end=1)
        x = graph.op.Concat(graph.op.Slice(tags, [0], tiles, [0]), x, axis=1)  # [n, tag_length + T, hidden]
    x = graph.op.Reshape(x, [-1, llm.hidden_size])  # [C, hidden]
    for j in range(len(config.cross_layers)) if blocks is None else blocks:
        name = f"language_model.cross_layers.{j}.attn"
        key = _heads(graph, config, graph.linear(x, f"{name}.k_proj"))
        value = _heads(graph, config, graph.linear(x, f"{name}.v_proj"))
        if config.cross_attention.qk_norm:
            key = graph.rms_norm(key, f"{name}.k_norm", llm.norm_eps)
        for kind, tensor in (("key", key), ("value", value)):
            graph.output(tensor, f"cross_{kind}.{j}", [llm.num_kv_heads, "cross_tokens", llm.head_dim])
    return graph.model()


def _heads(graph: StageGraph, config: NvlmConfig, x: ir.Value) -> ir.Value:
    """Turn [C, kv_heads * head_dim] into [kv_heads, C, head_dim]."""
    x = graph.op.Reshape(x, [0, config.llm.num_kv_heads, config.llm.head_dim])
    return graph.op.Transpose(x, perm=[1, 0, 2])
