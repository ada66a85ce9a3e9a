"""FP8 checkpoints built in fp8: the engine stores the checkpoint's own numbers and scales, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from fp8_checkpoints import DYNAMIC, STATIC, compress, edit, write_modelopt, write_quant_config
from hypothesis import given
from hypothesis import strategies as st
from onnx.numpy_helper import to_array
from safetensors.torch import load_file

from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine
from nvlm_trt.builders.quantization.calibration import Calibration
from nvlm_trt.builders.quantization.formats import quantised
from nvlm_trt.builders.quantization.fp8 import _quantised, quantize
from nvlm_trt.builders.quantization.source_scales import source_calibration
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError

Directory = Callable[[str], Path]
Tensors = Mapping[str, torch.Tensor]
FP8 = {"vision_encoder": "bf16", "projector": "bf16", "decoder": "fp8", "lm_head": "fp32"}
NO_GATE = QuantizationOptions(gate=None)
LAYER = "language_model.model.layers.{}"
STACKED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    **{name: (name,) for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")},
}


@given(
    numbers=st.lists(st.integers(0, 255).filter(lambda bits: bits & 0x7F != 0x7F), min_size=1, max_size=20),
    scale=st.floats(2.0**-100, 2.0**100, width=32),
)
def test_a_row_divided_by_its_scale_gives_the_stored_numbers_back(numbers: list[int], scale: float) -> None:
    """Every number of E4M3, zeros of both signs and denormals too."""
    stored = np.array([numbers], np.uint8).view(ml_dtypes.float8_e4m3fn)
    rows = stored.astype(np.float32) * np.float32(scale)
    again = quantize(rows, np.array([scale], np.float32))
    np.testing.assert_array_equal(again.view(np.uint8), stored.view(np.uint8))


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-19, 3))
def test_a_scale_that_the_graph_rounds_costs_less_than_new_numbers(
    dtype: ir.DataType, seed: int, exponent: int
) -> None:
    random = np.random.default_rng(seed)
    bits = random.integers(0, 256, (3, 32), dtype=np.uint8)
    bits[bits & 0x7F == 0x7F] = 0
    stored = bits.view(ml_dtypes.float8_e4m3fn)
    known = (random.uniform(1, 2, 3) * 2.0**exponent).astype(np.float32)
    rows = stored.astype(np.float32) * known[:, None]
    values, scales = _quantised(rows, dtype, known)
    restored = values.astype(np.float32) * scales[:, None]
    off = np.abs(restored - rows).max(1) / np.abs(rows).max(1)
    if exponent > -14:  # no denormal of fp16
        np.testing.assert_array_equal(values.view(np.uint8), bits)
        assert (off <= 2**-8).all()
    assert (off <= 2**-4 * 1.01).all()


def initializers(engine: Engine) -> dict[str, np.ndarray]:
    model = onnx.load(engine.path / "decoder.onnx")
    return {tensor.name: to_array(tensor) for tensor in model.graph.initializer if ".proj.weight" not in tensor.name}


def assert_taken_over(engine: Engine, source: Tensors, layers: int) -> None:
    """Compare with what the checkpoint's file holds."""
    ours = initializers(engine)
    for layer in map(LAYER.format, range(layers)):
        for name, parts in STACKED.items():
            weights = [source[f"{layer}.{part}.weight"] for part in parts]
            scales = [source[f"{layer}.{part}.weight_scale"].float().reshape(-1) for part in parts]
            stored = torch.cat([weight.view(torch.uint8) for weight in weights]).numpy()
            rows = torch.cat([scale.expand(len(weight)) for scale, weight in zip(scales, weights, strict=True)])
            values = ours[f"{layer}.{name}.weight.fp8"]
            np.testing.assert_array_equal(values.T.view(np.uint8), stored, err_msg=name)
            np.testing.assert_array_equal(ours[f"{layer}.{name}.weight.scale"], rows.numpy(), err_msg=name)


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_static_scales_of_compressed_tensors(checkpoint: Directory, tmp_path: Path, strategy: str) -> None:
    """Needs no calibration: its input scale is 0.05 everywhere, which a calibration would not find."""
    compress(checkpoint("nvlm-d-tiny"), tmp_path / "source", strategy, STATIC)
    engine = build_engine(tmp_path / "source", tmp_path / "engine", precision="fp8", quantization=NO_GATE)
    assert_taken_over(engine, load_file(tmp_path / "source" / "model.safetensors"), 6)
    scales = [value for name, value in initializers(engine).items() if name.endswith(".input_scale")]
    assert len(scales) == 6 * 5
    assert {float(scale) for scale in scales} == {float(np.float32(0.05))}
    assert engine.manifest.calibration == {"samples": {"source": "input scales of the checkpoint"}}


def test_modelopt(checkpoint: Directory, tmp_path: Path) -> None:
    write_modelopt(checkpoint("nvlm-d-tiny"), tmp_path / "source")
    write_quant_config(tmp_path / "source")
    engine = build_engine(tmp_path / "source", tmp_path / "engine", precision="fp8", quantization=NO_GATE)
    assert_taken_over(engine, load_file(tmp_path / "source" / "model.safetensors"), 6)


def test_the_greatest_of_the_input_scales_that_a_product_shares(checkpoint: Directory, tmp_path: Path) -> None:
    write_modelopt(checkpoint("nvlm-d-tiny"), tmp_path / "source")
    write_quant_config(tmp_path / "source")
    attention = LAYER.format(3) + ".self_attn"
    edit(tmp_path / "source", lambda tensors: tensors.update({f"{attention}.k_proj.input_scale": torch.tensor(0.5)}))
    calibration = calibration_of(tmp_path / "source")
    assert calibration is not None
    assert calibration.of(f"{attention}.qkv_proj.weight", 192).abs_max == 0.5 * 448
    assert calibration.of(f"{attention}.o_proj.weight", 192).abs_max == float(np.float32(0.02)) * 448


def calibration_of(directory: Path, lora: Path | None = None, **precisions: str) -> Calibration | None:
    with Checkpoint.open(directory, lora) as opened:
        return source_calibration(opened, FP8 | precisions)


class TestCalibrationIsMeasured:
    @pytest.fixture
    def static(self, checkpoint: Directory, tmp_path: Path) -> Path:
        compress(checkpoint("nvlm-d-tiny"), tmp_path / "source", "channel", STATIC)
        return tmp_path / "source"

    @pytest.mark.parametrize(("name", "activations"), [("nvlm-d-tiny", DYNAMIC), ("nvlm-x-tiny", STATIC)])
    def test_without_a_scale_for_every_layer(
        self, checkpoint: Directory, tmp_path: Path, name: str, activations: QuantizationArgs
    ) -> None:
        """The cross-attention of NVLM-X is not quantised here."""
        compress(checkpoint(name), tmp_path / "source", "channel", activations)
        assert calibration_of(tmp_path / "source", cross_attention="fp8") is None

    def test_for_components_that_the_checkpoint_does_not_quantise(self, static: Path) -> None:
        assert calibration_of(static) is not None
        assert calibration_of(static, lm_head="fp8") is None
        assert calibration_of(static, projector="fp8") is None

    def test_for_int8(self, static: Path) -> None:
        assert calibration_of(static, lm_head="int8") is None
        calibration = calibration_of(static)
        with Checkpoint.open(static) as opened, pytest.raises(EngineError, match="too little for int8; calibrate on"):
            quantised(opened, FP8 | {"decoder": "int8"}, calibration, 0.5)

    @pytest.mark.parametrize("scale", [0.0, -1.0])
    def test_with_a_scale_that_is_none(self, static: Path, scale: float) -> None:
        name = LAYER.format(5) + ".mlp.up_proj.input_scale"
        edit(static, lambda tensors: tensors.update({name: torch.tensor([scale])}))
        assert calibration_of(static) is None
