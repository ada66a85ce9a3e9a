"""InternViT and the projector in plain PyTorch, under the parameter names of nvidia/NVLM-D-72B."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvlm_trt.model.config import NvlmConfig, VisionConfig


class VisionEncoder(nn.Module):
    """Tiles [n, 3, E, E] -> patches [n, grid * grid, width], row by row: the class token is dropped, no final norm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionLayers(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.embeddings(pixel_values)  # [n, 1 + patches, width]
        return self.encoder(x)[:, 1:]


class VisionEmbeddings(nn.Module):
    """Embeds patches, a class token before them, with learned positions: [n, 3, E, E] -> [n, 1 + patches, width]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.position_embedding = nn.Parameter(torch.zeros(1, config.grid**2 + 1, width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [n, patches, width]
        class_token = self.class_embedding.expand(len(patches), -1, -1)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding


class VisionLayers(nn.Module):
    """x [n, 1 + patches, width] -> as x."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class VisionLayer(nn.Module):
    """Pre-norm transformer layer; LayerScale (ls1, ls2) on both branches."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = _norm(config)
        self.attn = VisionAttention(config)
        self.ls1 = nn.Parameter(torch.ones(width))
        self.norm2 = _norm(config)
        self.mlp = VisionMlp(config)
        self.ls2 = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1 * self.attn(self.norm1(x))
        return x + self.ls2 * self.mlp(self.norm2(x))


class VisionAttention(nn.Module):
    """Full attention within a tile. Its qk-norm is an RMSNorm over the whole width, before the split into heads."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.q_norm = nn.RMSNorm(width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        heads = [
            y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [n, heads, 1 + patches, head_dim]
            for y in (self.q_norm(query), self.k_norm(key), value)
        ]
        y = F.scaled_dot_product_attention(*heads)
        return self.proj(y.transpose(1, 2).flatten(2))


class VisionMlp(nn.Module):
    """The layers' FFN: [..., width] -> [..., width]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def pixel_shuffle(patches: Tensor, version: Literal["v1", "v2"]) -> Tensor:
    """Merges 2 x 2 neighbours: [n, grid * grid, width] -> [n, grid * grid / 4, 4 * width].

    Orders channels by (row, column, channel) within the neighbours. "v2" lists the merged tokens row by row; "v1",
    InternVL's first code, column by column."""
    count, tokens, width = patches.shape
    half = round(tokens**0.5) // 2
    x = patches.view(count, half, 2, half, 2, width)  # [n, row, row in pair, column, column in pair, width]
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    return x.permute(order).reshape(count, half * half, 4 * width)


def projector(config: NvlmConfig) -> nn.Sequential:
    """Makes mlp1: shuffled patches [..., 4 * vision width] -> [..., hidden], of one linear layer (X) or two (D, H)."""
    size, hidden, width = config.shuffled_size, config.llm.hidden_size, config.projector_width
    if width is None:
        return nn.Sequential(nn.LayerNorm(size), nn.Linear(size, hidden, bias=False))
    return nn.Sequential(
        nn.LayerNorm(size), nn.Linear(size, width, bias=False), nn.GELU(), nn.Linear(width, hidden, bias=False)
    )


def _norm(config: VisionConfig) -> nn.Module:
    kind = nn.RMSNorm if config.norm_type == "rms_norm" else nn.LayerNorm
    return kind(config.hidden_size, config.norm_eps)
