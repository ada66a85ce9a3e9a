"""Runs the reference model for training on a CPU: many questions about one image at once.

Uses the reference model's own modules; tests compare these passes with its forward. Spells attention out because the
backward of scaled_dot_product_attention is slow on a CPU at these sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nvlm_trt.prompt.encoder import PromptEncoder
from nvlm_trt.reference.cross_attention import GatedCrossAttentionBlock
from nvlm_trt.reference.decoder import Decoder, DecoderLayer, SelfAttention, rotary_embedding, rotate
from nvlm_trt.reference.model import ReferenceModel
from nvlm_trt.reference.vision import VisionEncoder, VisionLayer
from training.batch import Batch

_MEAN = torch.tensor([0.485, 0.456, 0.406]) * 255
_STD = torch.tensor([0.229, 0.224, 0.225]) * 255


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """[B, heads, S, d] x [B, heads, T, d] -> [B, heads, S, d]; `bias` is added to the scores."""
    return attention_weights(query, key, bias) @ value


def attention_weights(query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
    """[B, heads, S, d] x [B, heads, T, d] -> [B, heads, S, T]"""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    return torch.softmax(scores, -1, dtype=scores.dtype)


def encode_patches(encoder: VisionEncoder, pixels: Tensor) -> Tensor:
    """uint8 [n, E, E, 3] -> patches [n, grid * grid, width]: `VisionEncoder` on the normalised tiles."""
    embeddings = encoder.embeddings
    convolution = embeddings.patch_embedding
    patch = convolution.kernel_size[0]
    count, edge = len(pixels), pixels.shape[1] // patch
    x = (pixels.float() - _MEAN.to(pixels.device)) / _STD.to(pixels.device)
    x = x.view(count, edge, patch, edge, patch, 3).permute(0, 1, 3, 5, 2, 4)  # [n, row, column, 3, patch, patch]
    x = F.linear(x.reshape(count, edge * edge, -1), convolution.weight.flatten(1), convolution.bias)
    x = torch.cat([embeddings.class_embedding.expand(count, -1, -1).to(x.dtype), x], 1)
    x = x + embeddings.position_embedding.to(x.dtype)
    for layer in encoder.encoder.layers:
        assert isinstance(layer, VisionLayer)
        x = x + layer.ls1.to(x.dtype) * _vision_attention(layer, layer.norm1(x))
        x = x + layer.ls2.to(x.dtype) * layer.mlp(layer.norm2(x))
    return x[:, 1:]


def _vision_attention(layer: VisionLayer, x: Tensor) -> Tensor:
    attention = layer.attn
    query, key, value = attention.qkv(x).chunk(3, -1)
    heads = [
        y.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for y in (attention.q_norm(query), attention.k_norm(key), value)
    ]
    return attention.proj(attend(*heads).transpose(1, 2).flatten(2))


@dataclass
class Looks:
    """Attention weights [B, heads, S, keys] of the layers that learn where to look."""

    in_sequence: Tensor | None = None  # the self-attention of the middle layer
    in_cross: Tensor | None = None  # the last cross-attention


def decode(
    model: ReferenceModel,
    batch: Batch,
    features: Tensor | None,
    tag_ids: Tensor | None,
    looks: Looks | None = None,
) -> Tensor:
    """Returns the hidden states [B, S, hidden] after the final norm, for a packed batch.

    features: shuffled patches of all tiles [tiles, T, 4 * vision width]; tag_ids [max tiles, tag_length] for
    NVLM-H. Fills in `looks`.
    """
    decoder = model.language_model
    x = decoder.embed(batch.ids)  # [B, S, hidden]
    if features is not None and len(batch.llm_tiles):
        image = model.mlp1(features[batch.llm_tiles].float()).flatten(0, 1)
        x = x.to(image.dtype).masked_scatter((batch.ids == model.image_token_id)[..., None], image)
    cross = _CrossTokens(model, batch, features, tag_ids) if batch.cross_tiles.shape[1] else None
    rotation = _rotations(decoder, batch.positions)
    for i, layer in enumerate(decoder.model.layers):
        assert isinstance(layer, DecoderLayer)
        if cross is not None and i in decoder.cross_before:
            block = decoder.cross_layers[decoder.cross_before[i]]
            assert isinstance(block, GatedCrossAttentionBlock)
            x, weights = cross.attend(block, x)
            if looks:
                looks.in_cross = weights
        y, weights = _self_attention(layer.self_attn, layer.input_layernorm(x), rotation, batch.attention)
        if looks and i == len(decoder.model.layers) // 2:
            looks.in_sequence = weights
        x = x + y
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return decoder.model.norm(x)


class _CrossTokens:
    """The cross-attended tokens of a batch, [B, C, hidden], and which token may read which of them."""

    def __init__(self, model: ReferenceModel, batch: Batch, features: Tensor | None, tag_ids: Tensor | None) -> None:
        assert features is not None
        tokens = model.mlp1(features[batch.cross_tiles].float())  # [B, tiles, T, hidden]
        if tag_ids is not None:
            tags = model.language_model.embed(tag_ids[batch.cross_tags])  # [B, tiles, tag_length, hidden]
            tokens = torch.cat([tags.to(tokens.dtype), tokens], dim=2)
        self.tokens = tokens.flatten(1, 2)  # [B, C, hidden]
        places = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        ranges = batch.cross_ranges
        seen = (places >= ranges[..., :1]) & (places < ranges[..., 1:])  # [B, S, C]
        self.sees_image = seen.any(-1, keepdim=True)  # [B, S, 1]
        # finite, as -inf in a whole row gives NaN: a row that sees nothing is computed and then dropped
        self.bias = torch.where(seen, 0.0, -1e4)[:, None].to(self.tokens.dtype)

    def attend(self, block: GatedCrossAttentionBlock, x: Tensor) -> tuple[Tensor, Tensor]:
        attention = block.attn
        query = attention.q_norm(_heads(attention.q_proj(block.input_layernorm(x)), attention.head_dim))
        key = attention.k_norm(_heads(attention.k_proj(self.tokens), attention.head_dim))
        value = _heads(attention.v_proj(self.tokens), attention.head_dim)
        y, weights = _grouped(query, key, value, self.bias)
        y = x + torch.tanh(block.attn_gate) * attention.o_proj(y.transpose(1, 2).flatten(2))
        if block.ffn:
            y = y + torch.tanh(block.mlp_gate) * block.mlp(block.post_attention_layernorm(y))
        return torch.where(self.sees_image, y, x), weights


def _self_attention(
    attention: SelfAttention, x: Tensor, rotation: tuple[Tensor, Tensor], bias: Tensor
) -> tuple[Tensor, Tensor]:
    query, key, value = (
        _heads(projection(x), attention.head_dim)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    y, weights = _grouped(rotate(query, rotation), rotate(key, rotation), value, bias.to(query.dtype))
    return attention.o_proj(y.transpose(1, 2).flatten(2)), weights


def _grouped(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Computes grouped-query attention and its weights: each key and value head [B, kv_heads, T, d] serves a group."""
    group = query.shape[1] // key.shape[1]
    weights = attention_weights(query, key.repeat_interleave(group, 1), bias)
    return weights @ value.repeat_interleave(group, 1), weights


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, S, heads * d] -> [B, heads, S, d]"""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _rotations(decoder: Decoder, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cos, sin [B, 1, S, head_dim] at each token's position."""
    config = decoder.config
    table = rotary_embedding(config, 0, int(positions.max()) + 1, decoder.model.norm.weight)
    cos, sin = (part[positions][:, None] for part in table)
    if torch.is_autocast_enabled(cos.device.type):
        cos, sin = cos.to(torch.bfloat16), sin.to(torch.bfloat16)
    return cos, sin


def tag_ids(encoder: PromptEncoder, model: ReferenceModel) -> Tensor | None:
    """Returns the token ids of the tile tags [max tiles, tag_length] for NVLM-H, None for NVLM-D and -X."""
    if model.config.architecture != "H":
        return None
    return torch.from_numpy(encoder.tag_ids(model.config.max_tiles)).to(device_of(model))


def device_of(model: ReferenceModel) -> torch.device:
    """Returns the device of the model's weights."""
    return model.language_model.model.norm.weight.device
