"""The tensors that the kernel for prompts on Hopper takes. lab/gpu_check.sh checks the kernel itself."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'nvlm-trt[test]'")

from nvlm_trt.plugins.gated_cross_attention.hopper.launcher import fits


@pytest.mark.parametrize(
    ("head_dim", "cross_tokens", "dtype", "taken"),
    [
        (128, 1792, torch.bfloat16, True),
        (64, 1, torch.float16, True),
        (96, 64, torch.bfloat16, False),
        (32, 64, torch.float16, False),
        (128, 64, torch.float32, False),
        (128, 0, torch.bfloat16, False),
    ],
)
def test_fits(head_dim: int, cross_tokens: int, dtype: torch.dtype, taken: bool) -> None:
    query = torch.zeros(1, 8, 20, head_dim, dtype=dtype)
    key = torch.zeros(1, 2, cross_tokens, head_dim, dtype=dtype)
    assert fits(query, key, key.clone()) is taken


def test_tensors_have_to_be_aligned() -> None:
    """The copy engine reads 16 bytes at a time."""
    query, key = torch.zeros(1, 8, 20, 64, dtype=torch.float16), torch.zeros(1, 2, 50, 64, dtype=torch.float16)
    shifted = torch.zeros(key.numel() + 1, dtype=torch.float16)[1:].view(key.shape)
    assert shifted.is_contiguous()
    assert not fits(query, key, shifted)
    assert not fits(query, shifted, key)
