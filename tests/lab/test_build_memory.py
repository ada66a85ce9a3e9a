"""The sparse checkpoint of lab.build_memory: its size follows from the disk, and it opens and builds."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.build_memory import SPARE_DISK, checkpoint_bytes, fitting, write_calibration, write_sparse_checkpoint
from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.errors import EngineError
from nvlm_trt.model.precision import COMPONENTS
from nvlm_trt.model.presets import PRESETS

GB = 10**9


def test_layers_follow_from_the_size_and_from_the_disk() -> None:
    preset = PRESETS["nvlm-d-72b"]
    whole = fitting(preset, 14 * GB, 1000 * GB)
    assert abs(checkpoint_bytes(whole) - 14 * GB) < 1 * GB
    assert whole.llm.hidden_size == preset.llm.hidden_size
    tight = fitting(preset, 14 * GB, 2 * 10 * GB + SPARE_DISK)
    assert checkpoint_bytes(tight) <= 10 * GB
    assert 1 <= tight.llm.num_layers < whole.llm.num_layers
    with pytest.raises(EngineError, match="free space"):
        fitting(preset, 14 * GB, 1 * GB)


def test_a_sparse_checkpoint_opens_and_takes_no_space(tmp_path: Path) -> None:
    config = fitting(PRESETS["nvlm-d-small"], 1 * GB, 1000 * GB)
    directory = tmp_path / "checkpoint"
    write_sparse_checkpoint(directory, config)
    file = directory / "model.safetensors"
    assert file.stat().st_size > checkpoint_bytes(config)
    assert file.stat().st_blocks * 512 < 1 << 20
    with Checkpoint.open(directory) as checkpoint:
        assert checkpoint.config.llm == config.llm
        assert not checkpoint.take("mlp1.1.weight").load().any()


@pytest.mark.parametrize("preset", ["nvlm-d-tiny", "nvlm-h-tiny"])
def test_the_calibration_is_of_every_linear_layer(tmp_path: Path, preset: str) -> None:
    checkpoint, calibration = tmp_path / "checkpoint", tmp_path / "calibration.json"
    write_sparse_checkpoint(checkpoint, PRESETS[preset])
    write_calibration(calibration, checkpoint)
    precision = ",".join(f"{component}=int8" for component in COMPONENTS)
    options = QuantizationOptions(calibration, gate=None)
    engine = build_engine(checkpoint, tmp_path / "engine", precision=precision, smoke_test=False, quantization=options)
    assert set(engine.manifest.precision.values()) == {"int8"}
