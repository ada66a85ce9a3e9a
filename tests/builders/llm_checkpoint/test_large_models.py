"""Layers of NVLM-D-72B's width from a sparse checkpoint: headers, and memory that no tensor fills."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from lab.build_memory import HIGH_WATER, write_calibration, write_sparse_checkpoint
from nvlm_trt.builders.quantization.calibration import read_calibration
from nvlm_trt.builders.tensorrt_llm.layout import rank_layout
from nvlm_trt.builders.tensorrt_llm.mapping import Mapping
from nvlm_trt.builders.tensorrt_llm_checkpoint import LlmQuantization, check_llm_checkpoint
from nvlm_trt.model.hf_config import read_config
from nvlm_trt.model.presets import PRESETS

ROOT = Path(__file__).parents[3]
WRITE = """
import sys
from pathlib import Path
from nvlm_trt.builders.quantization.calibration import read_calibration
from nvlm_trt.builders.tensorrt_llm_checkpoint import LlmQuantization, Mapping, write_llm_checkpoint
from nvlm_trt.model.hf_config import read_config
from nvlm_trt.progress import no_progress

def run(checkpoint, directory, algo, calibration):
    quantization = LlmQuantization()
    if algo != "None":
        quantization = LlmQuantization(algo, "FP8", calibration=read_calibration(calibration))
    config = read_config(checkpoint)
    write_llm_checkpoint(checkpoint, config, directory, quantization, Mapping(2, 1), 0, no_progress)

if len(sys.argv) > 1:
    run(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer as wide as 72B's, with an eighth of the FFN and few words: 0.5 GB, of which the disk stores nothing."""
    preset = PRESETS["nvlm-d-72b"]
    config = replace(
        preset,
        vision=PRESETS["nvlm-d-tiny"].vision,
        llm=replace(preset.llm, num_layers=1, intermediate_size=3696, vocab_size=1024),
    )
    directory = tmp_path_factory.mktemp("large") / "checkpoint"
    write_sparse_checkpoint(directory, config)
    write_calibration(directory.parent / "calibration.json", directory)
    return directory


def high_water_mb(*arguments: object) -> float:
    command = [sys.executable, "-c", WRITE + HIGH_WATER, *map(str, arguments)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
    return int(process.stdout) * 1024 / 1e6


@pytest.mark.parametrize("algo", [None, "FP8"])
def test_memory_holds_some_rows(tmp_path: Path, checkpoint: Path, algo: str | None) -> None:
    calibration = checkpoint.parent / "calibration.json"
    written = tmp_path / "ranks"
    used = high_water_mb(checkpoint, written, algo, calibration) - high_water_mb()
    config = read_config(checkpoint)
    check_llm_checkpoint(written, config)
    quantization = LlmQuantization()
    if algo == "FP8":
        quantization = LlmQuantization("FP8", "FP8", calibration=read_calibration(calibration))
    total = 0
    for rank in range(2):
        path = written / f"rank{rank}.safetensors"
        total += path.stat().st_size
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
        assert names == rank_layout(config, Mapping(2, 1), quantization, rank).keys()
    qkv = 10240 * 8192 * 4 / 1e6  # the largest tensor in float32, 336 MB
    assert total > 230e6
    assert used < 0.3 * qkv, f"{used:.0f} MB"
