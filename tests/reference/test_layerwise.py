"""The layer-wise oracle computes the bits of the whole oracle, takes every tensor, and holds one layer in memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

from nvlm_trt.backends.layers import ForcedSequence
from nvlm_trt.checkpoint.random_checkpoint import write_random_checkpoint
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.layer_loop import LayerLoop
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.reference import layerwise
from nvlm_trt.reference.layerwise import LayerwiseReference
from nvlm_trt.reference.model import ReferenceModel

OTHER_LLM = {"family": "llama", "rope_theta": 5e6, "norm_eps": 1e-5, "tie_word_embeddings": True}
OTHER_VISION = {"norm_type": "layer_norm", "qk_norm": False, "qkv_bias": True}
CASES = [
    ("nvlm-d-tiny", {}),
    ("nvlm-x-tiny", {}),
    ("nvlm-h-tiny", {}),
    ("nvlm-d-tiny", {"llm": OTHER_LLM, "vision": OTHER_VISION, "pixel_shuffle": "v1", "projector_hidden_size": 96}),
    ("nvlm-x-tiny", {"llm": OTHER_LLM, "cross_attention": {"qk_norm": True}}),
    ("nvlm-h-tiny", {"cross_attention": {"ffn": False, "interval": 4}}),
]


def changed(name: str, changes: dict[str, Any]) -> NvlmConfig:
    config = PRESETS[name]
    for key, change in changes.items():
        value = replace(getattr(config, key), **change) if isinstance(change, dict) else change
        config = replace(config, **{key: value})
    return config


def forced(config: NvlmConfig, image_tokens: np.ndarray, cross_kv: np.ndarray | None) -> ForcedSequence:
    """Make 30 tokens of a prompt, image placeholders among them, and 7 more; ranges grow, the first are empty."""
    generator = np.random.default_rng(2)
    ids = generator.integers(0, 256, 37 + len(image_tokens))
    ids[5 : 5 + len(image_tokens)] = config.image_token_id
    ranges = np.zeros((len(ids), 2), np.int32)
    if cross_kv is not None:
        ranges[8:, 1] = np.linspace(1, cross_kv.shape[3], len(ids) - 8)
    return ForcedSequence(ids, ranges, 30 + len(image_tokens), image_tokens, cross_kv)


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_the_same_bits_as_the_whole_oracle_from_every_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(layerwise, "_HEAD_ROWS", 128)  # so that lm_head has several blocks
    write_random_checkpoint(tmp_path / "checkpoint", changed(name, changes), seed=0)
    whole = ReferenceModel.from_checkpoint(tmp_path / "checkpoint")
    tiles = np.random.default_rng(1).standard_normal((3, 3, 56, 56), dtype=np.float32)
    with Checkpoint.open(tmp_path / "checkpoint") as checkpoint, torch.inference_mode():
        oracle = LayerwiseReference(checkpoint, LayerLoop())
        image_tokens = oracle.encode(tiles)
        np.testing.assert_array_equal(image_tokens, whole.encode(torch.from_numpy(tiles)))

        cross_kv, pairs = None, None
        if oracle.config.cross_layers:
            tags = np.array([[60, 61, 62], [60, 61, 63], [7, 8, 9]]) if oracle.config.architecture == "H" else None
            cross_kv = oracle.cross_kv(image_tokens, tags)
            pairs = whole.cross_kv(torch.from_numpy(image_tokens), None if tags is None else torch.from_numpy(tags))
            np.testing.assert_array_equal(cross_kv, torch.stack([torch.stack(pair) for pair in pairs]))

        in_llm = image_tokens[2] if oracle.config.architecture != "X" else image_tokens[2, :0]
        sequences = [forced(oracle.config, in_llm, cross_kv), forced(oracle.config, in_llm[:0], None)]
        for sequence, logits in zip(sequences, oracle.logits(sequences), strict=True):
            expected, _ = whole(
                torch.from_numpy(sequence.input_ids)[None],
                torch.from_numpy(sequence.image_tokens),
                pairs if sequence.cross_kv is not None else None,
                torch.from_numpy(sequence.cross_ranges)[None],
            )
            assert np.isfinite(logits).all()
            assert logits.shape == (8, oracle.config.llm.vocab_size)
            np.testing.assert_array_equal(logits, expected[0, -8:])
        checkpoint.finish()


class Base(nn.Module):
    """The modules of a checkpoint under the names of its tensors, without a config that PEFT would read."""

    def __init__(self, reference: ReferenceModel) -> None:
        super().__init__()
        self.language_model = reference.language_model


def test_an_adapter_is_added(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    """To the embeddings too, of which single rows are read."""
    source = checkpoint("nvlm-d-tiny")
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj", "embed_tokens"], init_lora_weights=False)
    peft.get_peft_model(Base(ReferenceModel.from_checkpoint(source)), options).save_pretrained(tmp_path)
    whole = ReferenceModel.from_checkpoint(source, lora=tmp_path)
    ids = np.arange(40)
    sequence = ForcedSequence(ids, np.zeros((40, 2), np.int32), 30, np.empty((0, 192), np.float32))
    with Checkpoint.open(source, tmp_path) as adapted, Checkpoint.open(source) as base:
        (logits,) = LayerwiseReference(adapted, LayerLoop()).logits([sequence])
        (without,) = LayerwiseReference(base, LayerLoop()).logits([sequence])
    np.testing.assert_array_equal(logits, whole(torch.from_numpy(ids)[None])[0][0, -11:])
    assert np.abs(without - logits).max() > 0.01


def test_memory_does_not_grow_with_layers(tmp_path: Path) -> None:
    peaks = {layers: peak_bytes(tmp_path / str(layers), layers) for layers in (2, 8)}
    assert peaks[8] < 1.1 * peaks[2]


def peak_bytes(directory: Path, layers: int) -> int:
    """Run all stages of NVLM-X with so many layers. Return the most bytes that NumPy held: all weights are NumPy's."""
    changes = {"llm": {"num_layers": layers}, "vision": {"num_layers": layers}, "cross_attention": {"interval": 1}}
    write_random_checkpoint(directory, changed("nvlm-x-tiny", changes), seed=0)
    tiles = np.zeros((1, 3, 56, 56), np.float32)
    with Checkpoint.open(directory) as checkpoint:
        oracle = LayerwiseReference(checkpoint, LayerLoop())
        tracemalloc.start()
        try:
            image_tokens = oracle.encode(tiles)
            # keys and values grow with the blocks, so the decoder gets those of one token
            cross_kv = oracle.cross_kv(image_tokens)[:, :, :, :1]
            oracle.logits([forced(oracle.config, image_tokens[0, :0], cross_kv)])
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
