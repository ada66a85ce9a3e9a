"""Tests the gate of TensorRT engines, imitated by ONNX Runtime (tensorrt_on_cpu.py), with the trained NVLM-D-tiny."""

from __future__ import annotations

import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import tensorrt_scenarios as scenarios

from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine
from nvlm_trt.builders.quantization.calibration import read_calibration
from nvlm_trt.builders.quantization.gate import GateOptions
from nvlm_trt.engine import Engine

pytest.importorskip("polygraphy", reason="needs polygraphy: pip install 'nvlm-trt[test]'")

CHECKPOINT = Path(__file__).parents[3] / "checkpoints" / "nvlm-d-tiny"
GATE = GateOptions(count=14)  # one sample of each task, or two


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Builds the engine for ONNX Runtime with the same gate."""
    options = QuantizationOptions(calibration_samples=14, smoothquant_alpha=0, gate=GATE)
    output = tmp_path_factory.mktemp("portable") / "engine"
    return build_engine(CHECKPOINT, output, scenarios.LIMITS, precision="decoder=int8", quantization=options)


def test_is_measured_as_an_engine_for_onnx_runtime_is(
    tensorrt_process: ProcessPoolExecutor, portable: Engine, tmp_path: Path
) -> None:
    arguments = [CHECKPOINT, tmp_path / "engine", "fp32,decoder=int8", portable.path / "calibration.json", GATE]
    events = tensorrt_process.submit(scenarios.build_quantised, *arguments).result()
    manifest = Engine.open(tmp_path / "engine").manifest
    record, expected = manifest.accuracy_gate, portable.manifest.accuracy_gate
    assert record is not None
    assert expected is not None
    assert record["result"] == "passed"
    assert record["unquantised"] == "fp32"
    assert record["samples"] == expected["samples"]
    assert record["fp32_score"] == expected["fp32_score"] > 0.9
    assert record["score"] == pytest.approx(expected["score"], abs=0.08)  # an answer more or less
    assert manifest.precision["decoder"] == "int8"
    assert manifest.calibration == portable.manifest.calibration
    built = [event for event in events if event.startswith("built")]
    assert built == ["built vision_encoder", "built decoder"] * 2  # the engine, and the one it is compared with
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "engine"]


def test_refuses_a_destroyed_engine_and_names_the_component(
    tensorrt_process: ProcessPoolExecutor, portable: Engine, tmp_path: Path
) -> None:
    calibration = read_calibration(portable.path / "calibration.json")
    for name, linear in calibration.linears.items():
        if name.startswith("language_model.model"):
            saturated = {"clip": linear.clip / 1000, "abs_max": linear.abs_max / 1000}
            calibration.linears[name] = linear.model_copy(update=saturated)
    calibration.save(tmp_path / "calibration.json")
    arguments = [CHECKPOINT, tmp_path / "engine", "fp32,decoder=int8", tmp_path / "calibration.json", GATE]
    message, costs = tensorrt_process.submit(scenarios.refusal, *arguments).result()
    assert re.search(r"in fp32, .*decoder costs most \(.* in int8\): .*decoder=fp32", message)
    assert [(cost.component, cost.precision) for cost in costs] == [("decoder", "int8")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "calibration.json"]
