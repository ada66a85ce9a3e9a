"""Flamingo's gated cross-attention block, with one contiguous range of image tokens for each text token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvlm_trt.model.config import CrossAttentionConfig, LlmConfig


class GatedCrossAttentionBlock(nn.Module):
    """Computes x + tanh(attn_gate) * attention(norm(x), image), then, with `ffn`, x + tanh(mlp_gate) * mlp(norm(x)).

    Passes a token whose range is empty on unchanged, bit for bit, past the FFN too: text alone is the LLM alone."""

    def __init__(self, llm: LlmConfig, cross: CrossAttentionConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(llm.hidden_size, llm.norm_eps)
        self.attn = CrossAttention(llm, cross)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ffn = cross.ffn
        if self.ffn:
            self.post_attention_layernorm = nn.RMSNorm(llm.hidden_size, llm.norm_eps)
            self.mlp = SwiGlu(llm)
            self.mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, key: Tensor, value: Tensor, ranges: Tensor) -> Tensor:
        """x [B, S, hidden]; key, value [kv_heads, C, head_dim], shared by the batch; ranges [B, S, 2] -> as x."""
        y = x + torch.tanh(self.attn_gate) * self.attn(self.input_layernorm(x), key, value, ranges)
        if self.ffn:
            y = y + torch.tanh(self.mlp_gate) * self.mlp(self.post_attention_layernorm(y))
        sees_image = ranges[..., 1] > ranges[..., 0]  # [B, S]
        return torch.where(sees_image[..., None], y, x)


class CrossAttention(nn.Module):
    """Grouped-query attention of text tokens to image tokens, without positions."""

    def __init__(self, llm: LlmConfig, cross: CrossAttentionConfig) -> None:
        super().__init__()
        self.head_dim = llm.head_dim
        self.q_proj = nn.Linear(llm.hidden_size, llm.num_heads * llm.head_dim, bias=False)
        self.k_proj = nn.Linear(llm.hidden_size, llm.num_kv_heads * llm.head_dim, bias=False)
        self.v_proj = nn.Linear(llm.hidden_size, llm.num_kv_heads * llm.head_dim, bias=False)
        self.q_norm = nn.RMSNorm(llm.head_dim, llm.norm_eps) if cross.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(llm.head_dim, llm.norm_eps) if cross.qk_norm else nn.Identity()
        self.o_proj = nn.Linear(llm.num_heads * llm.head_dim, llm.hidden_size, bias=False)

    def key_value(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-attended tokens [C, hidden] -> key, value [kv_heads, C, head_dim]."""
        key = self.k_proj(image).unflatten(-1, (-1, self.head_dim)).transpose(0, 1)
        value = self.v_proj(image).unflatten(-1, (-1, self.head_dim)).transpose(0, 1)
        return self.k_norm(key), value

    def forward(self, x: Tensor, key: Tensor, value: Tensor, ranges: Tensor) -> Tensor:
        """Takes the block's arguments -> [B, S, hidden]; exactly 0 for a token whose range is empty."""
        query = self.q_norm(
            self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        )  # [B, heads, S, head_dim]
        tokens = torch.arange(key.shape[1], device=x.device)
        mask = (tokens >= ranges[..., :1]) & (tokens < ranges[..., 1:])  # [B, S, C]
        key, value = key.expand(len(x), -1, -1, -1), value.expand(len(x), -1, -1, -1)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None], enable_gqa=True)
        y = self.o_proj(y.transpose(1, 2).flatten(2))
        # softmax over nothing is NaN or 0, depending on the kernel that runs
        return y.masked_fill(~mask.any(-1, keepdim=True), 0.0)


class SwiGlu(nn.Module):
    """The LLM's FFN: [..., hidden] -> [..., hidden]."""

    def __init__(self, llm: LlmConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(llm.hidden_size, llm.intermediate_size, bias=False)
        self.up_proj = nn.Linear(llm.hidden_size, llm.intermediate_size, bias=False)
        self.down_proj = nn.Linear(llm.intermediate_size, llm.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
