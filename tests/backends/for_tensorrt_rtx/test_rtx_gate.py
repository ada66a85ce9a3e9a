"""Tests what a build for TensorRT-RTX tries and measures without a GPU, with real plans of the trained NVLM-D-tiny."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Run
from rtx_machine import LIMITS

from nvlm_trt.backends.tensorrt_rtx import build as rtx_build
from nvlm_trt.backends.tensorrt_rtx.build import ON_CPU
from nvlm_trt.backends.tensorrt_rtx.record import record_of
from nvlm_trt.builders import engine_build
from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine
from nvlm_trt.builders.quantization import blocked_weights
from nvlm_trt.builders.quantization.blocked_weights import quantize_signed
from nvlm_trt.builders.quantization.calibration import read_calibration
from nvlm_trt.builders.quantization.gate import AccuracyError, GateOptions
from nvlm_trt.engine import Engine

CHECKPOINT = Path(__file__).parents[3] / "checkpoints" / "nvlm-d-tiny"
GATE = GateOptions(count=14)  # one sample of each task, or two


def build(output: Path, precision: str, smoke_test: bool = False, **quantization: Any) -> Engine:
    return build_engine(
        CHECKPOINT,
        output,
        LIMITS,
        precision=precision,
        backend="tensorrt-rtx",
        smoke_test=smoke_test,
        quantization=QuantizationOptions(smoothquant_alpha=0, **quantization),
    )


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects what each engine of a build is: "plan" or "onnx", and the decoder's precision."""
    engines: list[str] = []
    real = engine_build.write_engine

    def note(*arguments: Any) -> Any:
        manifest = real(*arguments)
        engines.append(f"{manifest.backend_record['form']} {manifest.precision['decoder']}")
        return manifest

    monkeypatch.setattr(engine_build, "write_engine", note)
    return engines


@pytest.fixture(scope="module")
def int8_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return build(tmp_path_factory.mktemp("rtx") / "engine", "int8", calibration_samples=14, gate=GATE)


def test_a_quantised_engine_is_judged_on_the_cpu(int8_engine: Engine) -> None:
    manifest, record = int8_engine.manifest, record_of(int8_engine)
    gate = manifest.accuracy_gate
    assert gate is not None
    assert (gate["result"], gate["unquantised"], gate["samples"]["count"]) == ("passed", "bf16", 14)
    assert gate["fp32_score"] > 0.9
    assert gate["score"] == pytest.approx(gate["fp32_score"], abs=0.08)  # an answer more or less
    assert (record.form, record.tried_on) == ("plan", ON_CPU)
    assert "CPU" in ON_CPU
    # of the temporary engines nothing is left, and no ONNX file in the published one
    assert [path.name for path in int8_engine.path.parent.iterdir()] == [int8_engine.path.name]
    assert [path.name for path in int8_engine.path.iterdir() if ".onnx" in path.name] == []


def test_refuses_a_destroyed_engine_and_names_the_component(
    int8_engine: Engine, tmp_path: Path, written: list[str]
) -> None:
    calibration = read_calibration(int8_engine.path / "calibration.json")
    for name, linear in calibration.linears.items():
        if name.startswith("language_model.model"):
            saturated = {"clip": linear.clip / 1000, "abs_max": linear.abs_max / 1000}
            calibration.linears[name] = linear.model_copy(update=saturated)
    calibration.save(tmp_path / "calibration.json")
    with pytest.raises(AccuracyError) as caught:
        build(tmp_path / "engine", "int8", calibration=tmp_path / "calibration.json", gate=GATE)
    assert re.search(r"in bf16, .*decoder costs most \(.* in int8\): .*decoder=bf16", str(caught.value))
    assert [(cost.component, cost.precision) for cost in caught.value.costs] == [("decoder", "int8")]
    assert written == ["plan int8", "onnx int8", "onnx bf16"]
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]


def test_refuses_weights_that_lost_their_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plays the builder, whose plans nothing here can run: the gate has to notice it in the graphs."""

    def unsigned(*arguments: Any) -> tuple[Any, Any]:
        values, scales = quantize_signed(*arguments)
        return np.abs(np.maximum(values, -7)), scales

    monkeypatch.setattr(blocked_weights, "quantize_signed", unsigned)
    monkeypatch.setattr(rtx_build, "build_plan", lambda graph, plan, *rest: plan.touch())
    with pytest.raises(AccuracyError, match="decoder=bf16"):
        build(tmp_path / "engine", "decoder=int4-weight-only", gate=GATE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("smoke_test", "engines"),
    [(False, ["plan int4-weight-only"]), (True, ["plan int4-weight-only", "onnx int4-weight-only"])],
)
def test_without_gate_nothing_is_measured(
    tmp_path: Path, written: list[str], smoke_test: bool, engines: list[str]
) -> None:
    engine = build(tmp_path / "engine", "int4-weight-only", smoke_test=smoke_test, gate=None)
    assert engine.manifest.accuracy_gate == {"result": "not measured"}
    assert written == engines
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_the_command_says_that_nothing_was_measured(run_cli: Run, tmp_path: Path) -> None:
    command = ("build", "--checkpoint", CHECKPOINT, "--output", tmp_path / "engine", "--backend", "tensorrt-rtx")
    status, out, err = run_cli(*command, "--precision", "int8-weight-only", "--no-gate", "--max-seq-len", 256)
    assert (status, out) == (0, ""), err
    assert "accuracy gate: not measured" in err
