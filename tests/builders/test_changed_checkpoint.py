"""A checkpoint that changes while an engine is built from it fails the build, which leaves nothing behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.errors import CheckpointError

Directory = Callable[[str], Path]


@pytest.mark.parametrize("stage", ["vision_encoder", "cross_kv", "decoder", "smoke test"])
def test_shards_that_change_during_a_build(checkpoint: Directory, tmp_path: Path, stage: str) -> None:
    source = Path(shutil.copytree(checkpoint("nvlm-x-tiny"), tmp_path / "source"))
    weights = source / "model.safetensors"
    seen: set[str] = set()

    def rewrite(description: str, done: float, total: float) -> None:
        if stage in description and stage not in seen:
            seen.add(stage)
            data = bytearray(weights.read_bytes())
            data[-1] ^= 1
            weights.write_bytes(data)

    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed while the engine was built"):
        build_engine(source, tmp_path / "engine", progress=rewrite)
    assert seen == {stage}
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_shard_that_is_replaced_by_the_same_bytes_counts_as_changed(checkpoint: Directory, tmp_path: Path) -> None:
    """Time and size are what is compared: reading 150 GB again would take longer than the build."""
    source = Path(shutil.copytree(checkpoint("nvlm-d-tiny"), tmp_path / "source"))

    def touch(description: str, done: float, total: float) -> None:
        os.utime(source / "model.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match="was changed"):
        build_engine(source, tmp_path / "engine", progress=touch)
