"""Fixtures for tests of quantised engines: samples to calibrate on, calibrations, and engines in every precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine

Directory = Callable[[str], Path]
IMAGE = Path(__file__).parents[3] / "docs" / "images" / "receipt.png"


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSONL of questions with one image, with two images, and with text alone."""
    path = tmp_path_factory.mktemp("samples") / "samples.jsonl"
    questions = [
        {"prompt": "What is the total?", "answer": "9", "image": str(IMAGE)},
        {"prompt": "Is <image> like <image>?", "answer": "yes", "images": [str(IMAGE)] * 2},
        {"prompt": "2 + 2 =", "answer": "4"},
    ]
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return path


@pytest.fixture(scope="session")
def quantised_engine(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Directory, samples: Path
) -> Callable[[str, str], Path]:
    """`quantised_engine("nvlm-h-tiny", "int8")` builds an engine; all engines of a checkpoint share one calibration."""
    root = tmp_path_factory.mktemp("quantised")

    def make(name: str, precision: str) -> Path:
        directory = root / f"{name} {precision}"
        if not directory.exists():
            (saved,) = list(root.glob(f"{name} int8/calibration.json")) or [samples]
            options = QuantizationOptions(calibration=saved, gate=None)
            build_engine(checkpoint(name), directory, precision=precision, quantization=options)
        return directory

    return make


@pytest.fixture(scope="session")
def calibration_file(quantised_engine: Callable[[str, str], Path]) -> Directory:
    """The calibration.json that a build of `name` left beside its engine."""
    return lambda name: quantised_engine(name, "int8") / "calibration.json"
