"""Makes the cross-attention mask of a request from the ranges of its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nvlm_trt.backends.base import RangeArray

if TYPE_CHECKING:
    import torch


def cross_attention_mask(ranges: RangeArray, columns: int, device: str) -> torch.Tensor:
    """Return the mask [S, columns], bool, of ranges [S, 2]: token s attends to the cross-attended tokens
    ranges[s, 0] .. ranges[s, 1] - 1, where the mask is True.

    Made on the GPU: there it is all that the executor reads, and only its ranges have to be copied."""
    import torch

    bounds = torch.from_numpy(ranges).to(device)  # [S, 2]
    column = torch.arange(columns, dtype=bounds.dtype, device=device)
    return (column >= bounds[:, :1]) & (column < bounds[:, 1:])
