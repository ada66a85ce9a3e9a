"""The Qwen2 or Llama decoder in plain PyTorch, with the gated cross-attention blocks of NVLM-X and NVLM-H.

Parameters have transformers' names (`cross_layers` is ours), so that a checkpoint loads with strict=True.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvlm_trt.model.config import LlmConfig, NvlmConfig
from nvlm_trt.reference.cross_attention import GatedCrossAttentionBlock, SwiGlu

KeyValue = tuple[Tensor, Tensor]
Cache = list[KeyValue]  # per decoder layer: key, value [B, kv_heads, tokens so far, head_dim]


class Decoder(nn.Module):
    """Embeddings [B, S, hidden] -> logits [B, S, vocab]. Block j of cross_layers runs before layer j * interval."""

    def __init__(self, config: NvlmConfig) -> None:
        super().__init__()
        self.config = config.llm
        self.cross_before = {layer: j for j, layer in enumerate(config.cross_layers)}
        self.model = DecoderLayers(config.llm)
        if config.cross_attention is not None:
            self.cross_layers = nn.ModuleList(
                GatedCrossAttentionBlock(config.llm, config.cross_attention) for _ in config.cross_layers
            )
        if not config.llm.tie_word_embeddings:
            self.lm_head = nn.Linear(config.llm.hidden_size, config.llm.vocab_size, bias=False)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids [...] -> embeddings [..., hidden]."""
        return self.model.embed_tokens(input_ids)

    def cross_kv(self, tokens: Tensor) -> list[KeyValue]:
        """Cross-attended tokens [C, hidden] -> key, value [kv_heads, C, head_dim] of each block."""
        return [cast(GatedCrossAttentionBlock, block).attn.key_value(tokens) for block in self.cross_layers]

    def forward(
        self,
        x: Tensor,
        cross_kv: Sequence[KeyValue] | None = None,
        cross_ranges: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Cache]:
        """x [B, S, hidden] follows the tokens in `cache`; skips every gated block without `cross_kv`.

        cross_kv: key, value [kv_heads, C, head_dim] per block; cross_ranges [B, S, 2].
        Returns logits [B, S, vocab] and the cache of past and new tokens."""
        past = cache[0][0].shape[2] if cache else 0
        rotation = rotary_embedding(self.config, past, x.shape[1], x)
        grown: Cache = []
        for i, layer in enumerate(self.model.layers):
            if cross_kv is not None and i in self.cross_before:
                j = self.cross_before[i]
                x = self.cross_layers[j](x, *cross_kv[j], cross_ranges)
            x, key_value = layer(x, rotation, cache[i] if cache else None)
            grown.append(key_value)
        x = self.model.norm(x)
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return F.linear(x, head.weight), grown


class DecoderLayers(nn.Module):
    """Holds embeddings, layers and final norm, as transformers does under `model`; `Decoder` runs them."""

    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)


class DecoderLayer(nn.Module):
    """Pre-norm self-attention and FFN: x [B, S, hidden] -> as x."""

    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGlu(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        y, key_value = self.self_attn(self.input_layernorm(x), rotation, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), key_value


class SelfAttention(nn.Module):
    """Causal grouped-query attention with rotary positions; caches rotated keys."""

    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_width, key_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads or kv_heads, S, head_dim]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, rotation), rotate(key, rotation)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        new, total = query.shape[2], key.shape[2]
        causal = torch.ones(new, total, dtype=torch.bool, device=x.device).tril(total - new)  # [S, tokens so far]
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=causal, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2)), (key, value)


def rotary_embedding(config: LlmConfig, start: int, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cos, sin [S, head_dim] of positions start .. start + length - 1; pairs channels i, i + head_dim / 2."""
    channels = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=like.device)
    frequencies = 1.0 / config.rope_theta ** (channels / config.head_dim)
    positions = torch.arange(start, start + length, dtype=torch.float32, device=like.device)
    angles = torch.outer(positions, frequencies).repeat(1, 2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Applies rotary positions to x [B, heads, S, head_dim]."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
