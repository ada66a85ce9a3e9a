"""Folders in the form of nvidia/NVLM-D-72B: what inspect and a build find in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import Qwen2Tokenizer

from lab.shaped_checkpoint import DUMMY_HEADS, VOCABULARY, write_qwen2_tokenizer, write_shaped_checkpoint
from nvlm_trt.checkpoint.inspection import inspect_checkpoint
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.prompt.tokenizer import Tokenizer

SCRIPTS = "The total is 23.40 €, naïve; 东京 画像, Größe\n\n  مرحبا 😀"


@pytest.fixture
def config() -> NvlmConfig:
    """NVLM-D-tiny with the 25 heads of InternViT-6B."""
    tiny = PRESETS["nvlm-d-tiny"]
    vision = replace(tiny.vision, hidden_size=200, num_heads=25, num_layers=2)
    return replace(tiny, vision=vision, llm=replace(tiny.llm, vocab_size=700))


def test_random_numbers_in_padded_heads(tmp_path: Path, config: NvlmConfig) -> None:
    directory = tmp_path / "shaped"
    write_shaped_checkpoint(directory, config, shards=4, random=True)
    stored = {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
    attention = "vision_model.encoder.layers.1.attn"
    assert stored[f"{attention}.qkv.weight"].shape == (3 * (25 + DUMMY_HEADS) * 8, 200)
    assert stored[f"{attention}.proj.weight"].shape == (200, (25 + DUMMY_HEADS) * 8)
    with Checkpoint.open(directory) as checkpoint:  # which refuses dummy heads that add to the output
        for name in checkpoint.names:
            values = checkpoint.take(name).load()
            assert np.isfinite(values).all()
            assert np.abs(values).max() > 0, name
            if values.ndim == 2 and "position" not in name and "embed_tokens" not in name:
                assert 0.8 < values.std() * values.shape[1] ** 0.5 < 1.2, name
        checkpoint.finish()


def test_the_whole_form_takes_no_disk(tmp_path: Path) -> None:
    directory = tmp_path / "NVLM-D-72B"
    write_shaped_checkpoint(directory, PRESETS["nvlm-d-72b"])
    found = inspect_checkpoint(directory)
    assert (found.faults, len(found.shards)) == ([], 46)
    assert found.parts["decoder"].parameters == pytest.approx(70.2e9, rel=0.01)
    assert sum(path.stat().st_blocks * 512 for path in directory.iterdir()) < 10e6
    assert Tokenizer.from_directory(directory).vocab_size == VOCABULARY + 4


def test_the_tokenizer_is_one_of_qwen2(tmp_path: Path) -> None:
    write_qwen2_tokenizer(tmp_path, 3000)
    ours, theirs = Tokenizer.from_directory(tmp_path), Qwen2Tokenizer.from_pretrained(tmp_path)
    ids = ours.encode(SCRIPTS)
    assert list(ids) == theirs.encode(SCRIPTS)
    assert len(ids) < len(SCRIPTS.encode())  # words are merged
    assert ours.decode(ids) == theirs.decode(ids)
    assert {ours.token_text(i) for i in ours.stop_ids} == {"<|endoftext|>", "<|im_end|>"}
