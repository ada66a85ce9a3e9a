"""Tied embeddings: a checkpoint may store lm_head as well, if it is the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.checkpoint.random_checkpoint import write_random_checkpoint
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.errors import CheckpointError
from nvlm_trt.model.layout import EMBEDDING, LM_HEAD
from nvlm_trt.model.presets import PRESETS

TINY = PRESETS["nvlm-d-tiny"]


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    config = replace(TINY, llm=replace(TINY.llm, tie_word_embeddings=True))
    write_random_checkpoint(tmp_path / "tied", config, seed=0)
    return tmp_path / "tied"


def add_lm_head(directory: Path, change: Callable[[np.ndarray], np.ndarray] = lambda table: table) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {LM_HEAD: change(tensors[EMBEDDING].copy())}, directory / "model.safetensors")


def take_all(directory: Path) -> tuple[str, ...]:
    with Checkpoint.open(directory) as checkpoint:
        for name in checkpoint.names:
            checkpoint.take(name)
        checkpoint.finish()
        return checkpoint.names


@pytest.mark.parametrize("dtype", [None, np.float32])
def test_an_equal_lm_head_is_accepted_and_ignored(tied: Path, tmp_path: Path, dtype: type | None) -> None:
    with Checkpoint.open(tied) as checkpoint:
        digest = checkpoint.digest
    before = build_engine(tied, tmp_path / "before", smoke_test=False).manifest
    add_lm_head(tied, lambda table: table if dtype is None else table.astype(dtype))
    assert LM_HEAD not in take_all(tied)
    with Checkpoint.open(tied) as checkpoint:
        assert checkpoint.digest == digest
    assert build_engine(tied, tmp_path / "after", smoke_test=False).manifest == before


@pytest.mark.parametrize("row", [0, 300, -1])
def test_another_lm_head_is_an_error(tied: Path, tmp_path: Path, row: int) -> None:
    def change(table: np.ndarray) -> np.ndarray:
        table[row, 5] += 1
        return table

    add_lm_head(tied, change)
    vocabulary = TINY.llm.vocab_size
    message = (
        rf"model\.safetensors: {LM_HEAD} differs from {EMBEDDING} in row {row % vocabulary}, .*tie_word_embeddings"
    )
    with pytest.raises(CheckpointError, match=message):
        take_all(tied)
    with pytest.raises(CheckpointError, match=message):
        build_engine(tied, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_an_lm_head_of_another_shape_is_an_error(tied: Path) -> None:
    add_lm_head(tied, lambda table: table[:-1])
    with pytest.raises(CheckpointError, match=f"{LM_HEAD}.*shape"):
        take_all(tied)


def test_the_key_may_stand_at_the_top_of_the_config(tied: Path) -> None:
    raw = json.loads((tied / "config.json").read_text())
    del raw["llm_config"]["tie_word_embeddings"]
    (tied / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=f"no tensor {LM_HEAD}"):
        take_all(tied)
    (tied / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": True}))
    assert LM_HEAD not in take_all(tied)


def test_without_ties_lm_head_is_needed(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "untied", TINY, seed=0)
    tensors = load_file(tmp_path / "untied" / "model.safetensors")
    del tensors[LM_HEAD]
    save_file(tensors, tmp_path / "untied" / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"no tensor {LM_HEAD}"):
        Checkpoint.open(tmp_path / "untied")
