"""The parts of an int8 build's time, and both builds of the benchmark with a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.code_state import ROOT
from lab.int8_build import contender, options, parts, summary, worktree
from nvlm_trt.checkpoint.random_checkpoint import init_checkpoint
from nvlm_trt.errors import EngineError

EVENTS = [
    (1.0, "drawing train samples", 2),
    (4.0, "calibrating", 0),
    (10.0, "calibrating", 1),
    (16.0, "calibrating", 2),
    (20.0, "decoder", 100),
    (21.0, "accuracy gate: fp32 answering", 0),
    (31.0, "accuracy gate: fp32 answering", 4),
    (35.0, "accuracy gate: quantised answering", 4),
    (36.0, "published", 1),
]


def test_the_parts_of_a_build() -> None:
    assert parts(EVENTS) == {"calibration": 12, "gate": 14, "rest": 10, "whole": 36}


def test_few_samples_are_extrapolated_and_all_are_not() -> None:
    events = [[wall, 2 * wall, what, done] for wall, what, done in EVENTS]
    record = {"events": events, "opening": [2.0, 3.0], "used": [2, 4]}
    few = summary(record, (2, 4), (20, 40))
    assert (few["calibration s per sample"], few["gate s per sample"], few["rest s"]) == (6, 3, 12)
    assert few["total s"] == few["all samples s"] == 12 + 20 * 6 + 40 * 3
    assert few["all samples core s"] == 23 + 20 * 12 + 40 * 25 / 4
    whole = summary(record, (20, 40), (20, 40))
    assert (whole["total s"], whole["total core s"]) == (36, 72)
    assert whole["all samples s"] == few["all samples s"]


def test_builds_with_the_code_of_a_folder(tmp_path: Path) -> None:
    init_checkpoint(tmp_path / "checkpoint", "nvlm-d-tiny", seed=0)
    values = contender(ROOT, tmp_path / "checkpoint", tmp_path / "engine", (14, 14), (14, 14))()
    assert (values["calibration samples"], values["gate samples"]) == (14, 14)
    assert 0 < values["rest s"] < values["measured s"] == values["total s"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    with pytest.raises(EngineError, match="ended with status 1"):  # another folder's code would be measured
        contender(tmp_path, tmp_path / "checkpoint", tmp_path / "engine", (1, 1), (1, 1))()


def test_a_commit_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="git cannot check out"):
        worktree(tmp_path / "before", "0" * 40)
    assert options().parse_args(["--work", "x"]).few < 128
