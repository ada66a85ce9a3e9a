"""vision_encoder: pixel_values [tiles, 3, E, E] -> image_tokens [tiles, T, hidden].

InternViT without its class token, pixel shuffle and the projector (arXiv 2409.11402, section 4).
"""

from __future__ import annotations

import onnx_ir as ir

from nvlm_trt.builders.graphs.common import FLOAT, HIDDEN, HIDDEN_OUT, Shape, StageGraph, WeightFormat, WeightSource
from nvlm_trt.builders.graphs.vision_attention import VisionAttention, standard_vision_attention
from nvlm_trt.model.config import NvlmConfig, VisionConfig

_PROJECTOR_NORM_EPS = 1e-5  # torch.nn.LayerNorm's default, which the published projector uses


def vision_encoder_graph(
    config: NvlmConfig,
    weights: WeightSource,
    weight_format: WeightFormat | None = None,
    attention: VisionAttention = standard_vision_attention,
    dtype: ir.DataType = FLOAT,
) -> ir.Model:
    """Build the graph with self-attention in the form `attention`. `dtype`: for weights, pixels, image tokens."""
    graph = StageGraph("vision_encoder", weights, weight_format, dtype=dtype)
    x = _embed(graph, config.vision, _pixel_values(graph, config.vision))
    for i in range(config.vision.num_layers):
        x = _layer(graph, config.vision, x, i, attention)
    _output_image_tokens(graph, config, x)
    return graph.model()


# The graph in parts: what one gives is what the next one takes, hidden [tiles, grid ** 2 + 1, width].


def patches_graph(config: NvlmConfig, weights: WeightSource, weight_format: WeightFormat) -> ir.Model:
    """Build the part before the layers: pixel_values [tiles, 3, E, E] -> hidden_out."""
    graph = StageGraph("patches", weights, weight_format)
    x = _embed(graph, config.vision, _pixel_values(graph, config.vision))
    graph.output(x, HIDDEN_OUT, _hidden_shape(config.vision))
    return graph.model()


def vision_layer_graph(
    config: NvlmConfig, weights: WeightSource, weight_format: WeightFormat, i: int, attention: VisionAttention
) -> ir.Model:
    """Build layer i: hidden -> hidden_out."""
    graph = StageGraph("vision_layer", weights, weight_format)
    x = graph.input(HIDDEN, FLOAT, _hidden_shape(config.vision))
    graph.output(_layer(graph, config.vision, x, i, attention), HIDDEN_OUT, _hidden_shape(config.vision))
    return graph.model()


def projector_graph(config: NvlmConfig, weights: WeightSource, weight_format: WeightFormat) -> ir.Model:
    """Build the part behind the layers: hidden -> image_tokens [tiles, T, hidden size of the LLM]."""
    graph = StageGraph("projector", weights, weight_format)
    _output_image_tokens(graph, config, graph.input(HIDDEN, FLOAT, _hidden_shape(config.vision)))
    return graph.model()


def _pixel_values(graph: StageGraph, vision: VisionConfig) -> ir.Value:
    return graph.input("pixel_values", graph.dtype, ["tiles", 3, vision.image_size, vision.image_size])


def _hidden_shape(vision: VisionConfig) -> Shape:
    return ["tiles", vision.grid**2 + 1, vision.hidden_size]


def _output_image_tokens(graph: StageGraph, config: NvlmConfig, x: ir.Value) -> None:
    x = graph.op.Slice(x, [1], [config.vision.grid**2 + 1], [1])  # without the class token: [tiles, grid ** 2, width]
    x = _project(graph, config, _pixel_shuffle(graph, config, x))
    graph.output(x, "image_tokens", ["tiles", config.tokens_per_tile, config.llm.hidden_size])


def _embed(graph: StageGraph, vision: VisionConfig, pixels: ir.Value) -> ir.Value:
    """Embed patches by a linear layer (a convolution of equal kernel and stride), and put the class token first."""
    op = graph.op
    grid, patch, width = vision.grid, vision.patch_size, vision.hidden_size
    name = "vision_model.embeddings"
    x = op.Reshape(pixels, [0, 3, grid, patch, grid, patch])
    x = op.Reshape(op.Transpose(x, perm=[0, 2, 4, 1, 3, 5]), [0, grid * grid, 3 * patch * patch])
    x = graph.linear(x, f"{name}.patch_embedding", bias=True)  # [tiles, grid ** 2, width]
    tiles = op.Shape(pixels, start=0, end=1)
    class_token = op.Expand(graph.weight(f"{name}.class_embedding"), op.Concat(tiles, [1, width], axis=0))
    x = op.Concat(class_token, x, axis=1)
    return op.Add(x, graph.weight(f"{name}.position_embedding"))  # [tiles, grid ** 2 + 1, width]


def _layer(graph: StageGraph, vision: VisionConfig, x: ir.Value, i: int, attention: VisionAttention) -> ir.Value:
    op = graph.op
    name = f"vision_model.encoder.layers.{i}"
    with graph.scope(f"layers.{i}"):
        y = _self_attention(graph, vision, _norm(graph, vision, x, f"{name}.norm1"), f"{name}.attn", attention)
        x = op.Add(x, op.Mul(y, graph.weight(f"{name}.ls1")))
        y = op.Gelu(graph.linear(_norm(graph, vision, x, f"{name}.norm2"), f"{name}.mlp.fc1", bias=True))
        return op.Add(x, op.Mul(graph.linear(y, f"{name}.mlp.fc2", bias=True), graph.weight(f"{name}.ls2")))


def _self_attention(
    graph: StageGraph, vision: VisionConfig, x: ir.Value, name: str, attention: VisionAttention
) -> ir.Value:
    qkv = graph.linear(x, f"{name}.qkv", bias=vision.qkv_bias)
    query, key, value = graph.op.Split(qkv, axis=-1, num_outputs=3, _outputs=3)  # [tiles, tokens, width] each
    if vision.qk_norm:  # over the full width, before the split into heads
        query = graph.rms_norm(query, f"{name}.q_norm", vision.norm_eps)
        key = graph.rms_norm(key, f"{name}.k_norm", vision.norm_eps)
    y = attention(graph, vision, query, key, value, name)
    return graph.linear(y, f"{name}.proj", bias=True)


def _norm(graph: StageGraph, vision: VisionConfig, x: ir.Value, name: str) -> ir.Value:
    norm = graph.rms_norm if vision.norm_type == "rms_norm" else graph.layer_norm
    return norm(x, name, vision.norm_eps)


def _pixel_shuffle(graph: StageGraph, config: NvlmConfig, x: ir.Value) -> ir.Value:
    """Merge 2 x 2 neighbouring tokens: [tiles, grid ** 2, width] -> [tiles, T, 4 * width].

    The new channels are (row in the square, column in the square, channel). "v1" leaves the squares transposed."""
    op = graph.op
    half, width = config.vision.grid // 2, config.vision.hidden_size
    x = op.Reshape(x, [0, half, 2, half, 2, width])  # (row, row in square, column, column in square)
    perm = [0, 1, 3, 2, 4, 5] if config.pixel_shuffle == "v2" else [0, 3, 1, 2, 4, 5]
    return op.Reshape(op.Transpose(x, perm=perm), [0, half * half, 4 * width])


def _project(graph: StageGraph, config: NvlmConfig, x: ir.Value) -> ir.Value:
    x = graph.layer_norm(x, "mlp1.0", _PROJECTOR_NORM_EPS)
    x = graph.linear(x, "mlp1.1")
    if config.projector_width is None:  # NVLM-X: one layer
        return x
    return graph.linear(graph.op.Gelu(x), "mlp1.3")
