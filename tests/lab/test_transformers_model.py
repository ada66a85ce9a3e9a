"""The models with which lab times transformers compute what our reference computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lab.transformers_model import language_model, whole_model, write_vision_encoder
from nvlm_trt.reference.model import ReferenceModel

Checkpoints = Callable[[str], Path]


@torch.inference_mode()
def test_whole_model(checkpoint: Checkpoints) -> None:
    directory = checkpoint("nvlm-d-tiny")
    ours, theirs = ReferenceModel.from_checkpoint(directory), whole_model(directory)
    generator = torch.Generator().manual_seed(0)
    edge, tokens = ours.config.vision.image_size, ours.config.tokens_per_tile
    tiles = torch.randn(2, 3, edge, edge, generator=generator)
    text = torch.randint(0, 256, (9,), generator=generator)
    ids = torch.cat([text[:4], torch.full((2 * tokens,), ours.image_token_id), text[4:]])[None]
    expected, _ = ours(ids, ours.encode(tiles).flatten(0, 1))
    for attention in ("eager", "sdpa"):
        theirs.set_attn_implementation(attention)
        torch.testing.assert_close(theirs(input_ids=ids, pixel_values=tiles).logits, expected, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_the_vision_encoder_as_torchscript(checkpoint: Checkpoints, tmp_path: Path) -> None:
    directory = checkpoint("nvlm-d-tiny")
    write_vision_encoder(directory, tmp_path / "encoder.pt")
    ours = ReferenceModel.from_checkpoint(directory)
    edge = ours.config.vision.image_size
    tiles = torch.randn(3, 3, edge, edge, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.jit.load(tmp_path / "encoder.pt")(tiles), ours.encode(tiles), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.3)])
@torch.inference_mode()
def test_language_model(checkpoint: Checkpoints, dtype: torch.dtype, tolerance: float) -> None:
    directory = checkpoint("nvlm-d-tiny")
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(1))
    model = language_model(directory, dtype)
    assert next(model.parameters()).dtype == dtype
    assert all(buffer.dtype == torch.float32 for name, buffer in model.named_buffers() if name.endswith("inv_freq"))
    expected, _ = ReferenceModel.from_checkpoint(directory)(ids)
    torch.testing.assert_close(model(ids).logits.float(), expected, rtol=0, atol=tolerance)
