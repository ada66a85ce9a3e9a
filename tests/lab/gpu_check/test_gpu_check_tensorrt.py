"""gpu_check's TensorRT part without TensorRT: its messages, and how it reads the engine inspector."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from lab.gpu_check import tensorrt_engines
from lab.gpu_check.record import NotAvailableError
from lab.gpu_check.tensorrt_plan import Layers, component_plans

LAYERS = [
    {"Name": "up", "LayerType": "gemm", "TacticName": "sm90_fp8", "Inputs": [{"Format/Datatype": "FP8 row-major"}]},
    {"Name": "[DequantizeLinear up + down]", "LayerType": "kgen", "Inputs": [{"Format/Datatype": "BFloat16"}]},
    {"Name": "copy", "LayerType": "Reformat", "Inputs": [{"Format/Datatype": "FP8 row-major"}]},
    {"Name": "nvlm_v1::GatedCrossAttention_0", "LayerType": "PluginV3", "Inputs": []},
    {"Name": "scale", "LayerType": "Dequantize", "Inputs": [{"Format/Datatype": "FP8 row-major"}]},
]


def test_layers() -> None:
    layers = Layers(LAYERS)
    assert layers.count == 5
    assert layers.named("GatedCrossAttention", "gated_cross_attention_kernel") == 1
    assert layers.named("dequantize") == 1
    assert layers.reading("FP8") == 2
    assert layers.kinds() == "1 gemm, 1 kgen, 1 Reformat, 1 PluginV3, 1 Dequantize"
    with pytest.raises(ValueError, match="DETAILED"):
        Layers(["up", "down"])


def test_without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    ((name, trial),) = tensorrt_engines.trials()
    assert name == "engines"
    with pytest.raises(NotAvailableError, match="TensorRT is not installed"):
        trial()


def test_without_the_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    def null(logger: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    class Logger:
        ERROR = 1

        def __init__(self, severity: int) -> None:
            pass

    bindings = types.SimpleNamespace(Logger=Logger, Builder=null, __version__="11.4.0")
    monkeypatch.setitem(sys.modules, "tensorrt", bindings)
    with pytest.raises(NotAvailableError, match=r"11\.4\.0 is here without its builder"):
        tensorrt_engines.require_tensorrt()
    bindings.Builder = lambda logger: object()
    monkeypatch.setattr(tensorrt_engines, "BUILDER", "nvlm_trt.builders.absent")
    with pytest.raises(NotAvailableError, match=r"nvlm_trt\.builders\.absent"):
        tensorrt_engines.require_tensorrt()


def test_a_builder_with_other_arguments_is_not_available(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def build_engine(checkpoint: Path, output: Path, **arguments: object) -> None:
        calls.append((checkpoint, output, arguments))

    module = types.ModuleType("builder")
    module.QuantizationOptions = lambda calibration, gate: (calibration, gate)  # type: ignore[attr-defined]
    module.build_engine = build_engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "builder", module)
    monkeypatch.setattr(tensorrt_engines, "BUILDER", "builder")
    tensorrt_engines.build(tmp_path, tmp_path / "out", "bf16", {"max_slots": 8}, None)
    assert calls == [
        (
            tmp_path,
            tmp_path / "out",
            {"overrides": {"max_slots": 8}, "precision": "bf16", "quantization": (None, None), "backend": "tensorrt"},
        )
    ]
    module.build_engine = lambda checkpoint, output: None  # type: ignore[attr-defined]
    with pytest.raises(NotAvailableError, match="unexpected keyword argument"):
        tensorrt_engines.build(tmp_path, tmp_path / "out", "bf16", {}, None)


def test_configs_suit_the_plugin() -> None:
    from nvlm_trt.plugins.gated_cross_attention.blocks import HEAD_DIMS

    for config in (*map(tensorrt_engines.tiny_config, "dxh"), tensorrt_engines.stack_config()):
        assert config.llm.head_dim in HEAD_DIMS
    stack = tensorrt_engines.stack_config()
    assert (stack.llm.hidden_size, stack.llm.num_layers, stack.cross_layers) == (8192, 2, (0,))


def test_a_calibration_is_made_up_for_every_linear_layer(tmp_path: Path) -> None:
    from nvlm_trt.builders.quantization.calibration import read_calibration

    config = tensorrt_engines.tiny_config("x")
    bench = tensorrt_engines.Workbench(tmp_path)
    path = tensorrt_engines.made_up_calibration(bench.checkpoint(config), config)
    calibration = read_calibration(path)
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    assert calibration.of(name, config.llm.intermediate_size).clip == 8
    with pytest.raises(NotAvailableError, match="was not built"):
        bench.engine(config, "fp8")


def test_plans_by_component(tmp_path: Path) -> None:
    for name in ("decoder.plan", "vision_encoder.plan", "config.json"):
        (tmp_path / name).touch()
    assert set(component_plans(tmp_path)) == {"decoder", "vision_encoder"}
