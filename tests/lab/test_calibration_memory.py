"""The models of lab.calibration_memory differ in their layers alone, and calibrations that differ stop it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lab.calibration_memory import WAYS, compare, high_water_mb, model
from nvlm_trt.checkpoint.random_checkpoint import init_checkpoint
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


def test_each_way_is_what_it_says(tmp_path: Path) -> None:
    init_checkpoint(tmp_path / "d", "nvlm-d-tiny", seed=0)
    for way in WAYS:
        work = tmp_path / way
        assert high_water_mb([tmp_path / "d", work, way, 1, tmp_path / f"{way}.json"]) > 0
        # only a calibration by layer has a folder of its own
        assert (work / ".engine.calibration").exists() == (way == "layer")
    assert (tmp_path / "layer.json").read_bytes() == (tmp_path / "model.json").read_bytes()
