"""The files beside the LLM: vision encoder with projector, and tag embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from split_models import SplitModel

from nvlm_trt.builders.tensorrt_llm.components import write_tag_embeddings, write_vision_encoder
from nvlm_trt.errors import EngineError
from nvlm_trt.model.layout import projector_layout, vision_layout
from nvlm_trt.progress import no_progress
from nvlm_trt.reference.model import ReferenceModel

Models = Callable[[str], SplitModel]


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("architecture", ["D", "X"])
def test_the_vision_encoder(
    tmp_path: Path, split_model: Models, architecture: str, dtype: str, expected: torch.dtype
) -> None:
    model = split_model(architecture)
    path = tmp_path / "vision_encoder.safetensors"
    seen: list[float] = []
    write_vision_encoder(model.checkpoint, model.config, path, dtype, lambda _, done, total: seen.append(done / total))
    assert seen == sorted(seen)
    assert seen[-1] == 1
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    found = load_file(path)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        **vision_layout(model.config),
        **projector_layout(model.config),
    }
    assert {tensor.dtype for tensor in found.values()} == {expected}
    with torch.device("meta"):
        loaded = ReferenceModel(model.config)
    missing, extra = loaded.load_state_dict(
        {name: tensor.double() for name, tensor in found.items()}, strict=False, assign=True
    )
    assert not extra
    assert all(name.startswith("language_model.") for name in missing)
    tiles = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    want = ReferenceModel.from_checkpoint(model.checkpoint, expected).double().encode(tiles)
    torch.testing.assert_close(loaded.encode(tiles), want, rtol=0, atol=1e-12)


def test_tag_embeddings(tmp_path: Path, split_model: Models) -> None:
    model = split_model("H")
    path = tmp_path / "tag_embeddings.safetensors"
    write_tag_embeddings(model.checkpoint, model.config, path, "bf16")
    ((name, tags),) = load_file(path).items()
    assert (name, tags.dtype) == ("tag_embeddings", torch.bfloat16)
    assert len(tags) == model.config.max_tiles
    assert tags.shape[2] == model.config.llm.hidden_size
    assert len({tuple(tag.flatten().tolist()) for tag in tags}) == len(tags)


def test_a_failed_writer_leaves_nothing(tmp_path: Path, split_model: Models) -> None:
    model = split_model("D")

    def stop(description: str, done: float, total: float) -> None:
        raise EngineError("stopped")

    with pytest.raises(EngineError, match="stopped"):
        write_vision_encoder(model.checkpoint, model.config, tmp_path / "vision_encoder.safetensors", "bf16", stop)
    assert not list(tmp_path.iterdir())
    with pytest.raises(EngineError, match="cannot write|disk full"):
        write_vision_encoder(
            model.checkpoint, model.config, model.checkpoint / "config.json" / "x", "bf16", no_progress
        )
