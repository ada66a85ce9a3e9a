"""Tests `nvlm-trt build` with quantisation: its messages, and a one-line error for every mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Run, assert_one_line_error

Directory = Callable[[str], Path]


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (("--precision", "int9"), ("'int9'", "int8-weight-only")),
        (("--precision", "fp16"), ("computes nothing in fp16",)),
        (("--precision", "encoder=int8"), ("'encoder' is not a component", "vision_encoder")),
        (("--precision", "int8", "--max-accuracy-drop", "101"), ("--max-accuracy-drop",)),
        (("--precision", "int8", "--smoothquant-alpha", "2"), ("--smoothquant-alpha",)),
        (("--precision", "int8", "--calibration", "none.json"), ("none.json", "JSONL")),
        (("--precision", "int8", "--gate", "none.jsonl"), ("none.jsonl",)),
        (("--precision", "int8", "--no-gate", "--gate-samples", "3"), ("--no-gate measures nothing",)),
        (("--gate-samples", "3"), ("an unquantised engine passes no gate", "--gate-samples")),
        (("--precision", "int4-weight-only", "--calibration", "a.jsonl"), ("only int8 and fp8", "--calibration")),
    ],
)
def test_mistakes(run_cli: Run, checkpoint: Directory, tmp_path: Path, options: tuple, fragments: tuple) -> None:
    result = run_cli("build", "--checkpoint", checkpoint("nvlm-d-tiny"), "--output", tmp_path / "out", *options)
    assert_one_line_error(result, *fragments)
    assert list(tmp_path.iterdir()) == []


def test_a_gate_that_says_nothing_warns_and_publishes(run_cli: Run, checkpoint: Directory, tmp_path: Path) -> None:
    command = ("build", "--checkpoint", checkpoint("nvlm-d-tiny"), "--output", tmp_path / "out")
    status, out, err = run_cli(*command, "--precision", "int8-weight-only", "--gate-samples", 14)
    assert status == 0
    assert out == ""
    warning, published = err.splitlines()
    assert warning.startswith("warning: the accuracy gate says nothing")
    assert "% of the answers are the same; 14 samples)" in warning
    assert published.startswith("published")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["accuracy_gate"]["result"] == "meaningless"


def test_says_how_many_samples_were_used(run_cli: Run, checkpoint: Directory, tmp_path: Path) -> None:
    text, gate = tmp_path / "text.jsonl", tmp_path / "gate.jsonl"
    question = json.dumps({"prompt": "2 + 2 =", "answer": "unknown"}) + "\n"
    text.write_text(question * 49)
    gate.write_text(question * 128)
    command = ("build", "--checkpoint", checkpoint("nvlm-d-tiny"), "--precision", "decoder=int8")
    first, again = tmp_path / "first", tmp_path / "again"
    status, _, err = run_cli(*command, "--output", first, "--calibration", text, "--gate", gate)
    assert status == 0
    calibration, warning, _ = err.splitlines()
    assert calibration == "calibration: 48 of 49 samples; more moved no scale"
    assert warning.endswith("; 64 of 128 samples, which leave no doubt)")
    status, _, err = run_cli(*command, "--output", again, "--calibration", first / "calibration.json", "--no-gate")
    assert status == 0
    assert err.splitlines()[:2] == [calibration, "accuracy gate: not measured"]


def test_no_gate(run_cli: Run, checkpoint: Directory, tmp_path: Path) -> None:
    command = ("build", "--checkpoint", checkpoint("nvlm-d-tiny"), "--output", tmp_path / "out")
    status, _, err = run_cli(*command, "--precision", "int4-weight-only", "--no-gate")
    assert status == 0
    assert err.splitlines()[0] == "accuracy gate: not measured"


def test_a_refusal_shows_what_each_component_costs(
    run_cli: Run, checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvlm_trt.builders import engine_build as onnx_engine
    from nvlm_trt.builders.quantization.gate import AccuracyError, ComponentCost

    def refuse(*_: object, **__: object) -> None:
        costs = [ComponentCost("decoder", "int8", 0.9, 5.0), ComponentCost("lm_head", "int8", 0.94, 1.0)]
        raise AccuracyError("accuracy gate: too bad", costs)

    monkeypatch.setattr(onnx_engine, "build_engine", refuse)
    command = ("build", "--checkpoint", checkpoint("nvlm-d-tiny"), "--output", tmp_path / "out")
    status, _, err = run_cli(*command, "--precision", "int8,lm_head=int8")
    first, second, last = err.splitlines()
    assert status == 2
    assert first.split() == ["decoder", "int8", "90.00", "-5.00", "points"]
    assert second.split() == ["lm_head", "int8", "94.00", "-1.00", "points"]
    assert last == "error: accuracy gate: too bad"
