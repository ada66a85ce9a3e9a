"""The models of lab.calibration_memory differ in their layers alone, and calibrations that differ stop it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lab.calibration_memory import WAYS, compare, model
from nvlm_trt.errors import EngineError


def test_models_differ_in_their_layers_alone() -> None:
    few, many = model(2), model(24)
    assert few.vision == many.vision
    assert replace(many.llm, num_layers=2) == few.llm
    assert few.image_token_id is None  # the tokenizer's, which the checkpoint gets


def test_calibrations_of_a_model_are_compared(tmp_path: Path) -> None:
    (tmp_path / "2 layers").mkdir()
    files = [tmp_path / f"2 layers.{way}.json" for way in WAYS]
    files[0].write_text("a")
    compare(tmp_path, 2)
    files[1].write_text("b")
    with pytest.raises(EngineError, match="calibrations of 2 layers differ"):
        compare(tmp_path, 2)
    files[1].write_text("a")
    compare(tmp_path, 2)
    assert not list(tmp_path.iterdir())
