"""The sparse engine of lab.verify_memory takes little disk, and its comparison is measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lab.build_memory import write_sparse_checkpoint
from lab.verify_memory import build_sparse_engine, peaks_mb, with_layers
from nvlm_trt.model.presets import PRESETS


@pytest.mark.skipif(shutil.which("fallocate") is None, reason="needs fallocate of util-linux")
def test_a_sparse_engine_is_compared(tmp_path: Path) -> None:
    config = with_layers(PRESETS["nvlm-d-tiny"], 1)
    write_sparse_checkpoint(tmp_path / "checkpoint", config)
    build_sparse_engine(tmp_path / "checkpoint", tmp_path / "engine", "fp32")
    data = tmp_path / "engine" / "vision_encoder.onnx.data"
    assert data.stat().st_size > 1 << 20
    assert data.stat().st_blocks * 512 < data.stat().st_size / 4
    anonymous, resident = peaks_mb(tmp_path / "engine", tmp_path / "checkpoint", tokens=2)
    assert 50 < anonymous < resident < 3000
