"""Weights behind DequantizeLinear: the numbers of the file, and ONNX Runtime's products with them."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from one_linear import NAME, OneWeight, known, linear_model
from onnx import TensorProto, numpy_helper

from nvlm_trt.builders.graphs.common import FLOAT, Embedding, LinearWeight, StageGraph
from nvlm_trt.builders.model_file import save_model
from nvlm_trt.builders.quantization.blocked_weights import BlockedWeights, quantize_signed
from nvlm_trt.builders.quantization.formats import WeightForm, quantised
from nvlm_trt.builders.quantization.weight_only import BLOCK, quantize
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.errors import EngineError
from nvlm_trt.model.precision import COMPONENTS

RNG = np.random.default_rng(0)
TYPES = {8: TensorProto.INT8, 4: TensorProto.INT4}


def product_of_file(model: ir.Model, x: np.ndarray, path: Path) -> tuple[np.ndarray, dict[str, onnx.TensorProto]]:
    """Save and check a model, and run the file as it is. Return y and the file's tensors by name."""
    save_model(model, path, lambda *_: None)
    onnx.checker.check_model(path, full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    tensors = onnx.load(path).graph.initializer
    return session.run(["y"], {"x": x})[0], {tensor.name: tensor for tensor in tensors}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inputs", [64, 192, 512])
@pytest.mark.parametrize("in_branch", [False, True], ids=["main graph", "branch"])
def test_multiplies_by_the_restored_weight(tmp_path: Path, bits: int, inputs: int, in_branch: bool) -> None:
    weight = RNG.standard_normal((26, inputs), dtype=np.float32)
    x = RNG.standard_normal((5, inputs), dtype=np.float32)
    y, tensors = product_of_file(linear_model(weight, BlockedWeights(bits), in_branch), x, tmp_path / "m.onnx")
    stored, scales = tensors[f"{NAME}.weight.int{bits}"], tensors[f"{NAME}.weight.scale"]
    assert (stored.data_type, list(stored.dims)) == (TYPES[bits], [inputs, 26])
    assert list(scales.dims) == [inputs // BLOCK[bits], 26]
    values, by_block = numpy_helper.to_array(stored).astype(np.float32), numpy_helper.to_array(scales)
    restored = values * np.repeat(by_block, BLOCK[bits], axis=0)
    np.testing.assert_allclose(y, x.astype(np.float64) @ restored.astype(np.float64), rtol=1e-4, atol=1e-4)
    assert (by_block > 0).all()
    loss = np.linalg.norm(restored - weight.T) / np.linalg.norm(weight)
    assert loss < (0.007 if bits == 8 else 0.1)


@pytest.mark.parametrize("bits", [8, 4])
def test_numbers_are_those_for_onnx_runtime_where_the_scale_is_positive(bits: int) -> None:
    weight = RNG.standard_normal((40, 256), dtype=np.float32)
    stored, signed = quantize(weight, bits)
    values, scales = quantize_signed(weight, bits, FLOAT)
    same = signed > 0
    assert same.all() if bits == 8 else 0.3 < same.mean() < 0.7
    np.testing.assert_array_equal(scales[same], signed[same])
    offset = stored.astype(np.int16) - 2 ** (bits - 1)
    np.testing.assert_array_equal(values.reshape(stored.shape)[same], offset[same])


@given(
    st.integers(0, 2**32 - 1),
    st.floats(-30, 30),
    st.sampled_from([8, 4]),
    st.sampled_from([FLOAT, ir.DataType.BFLOAT16]),
)
def test_scales_are_positive_numbers_of_the_graphs_type(
    seed: int, exponent: float, bits: int, dtype: ir.DataType
) -> None:
    """The values restore the weight with the scales as they are stored, also of zeros."""
    weight = np.random.default_rng(seed).standard_normal((3, 128), dtype=np.float32) * np.float32(2.0**exponent)
    weight[0] = 0
    values, scales = quantize_signed(weight, bits, dtype)
    assert (scales > 0).all()
    np.testing.assert_array_equal(scales, scales.astype(dtype.numpy()).astype(np.float32))
    steps = np.repeat(scales, BLOCK[bits], axis=1)
    off = np.abs(values * steps - weight)
    within = np.abs(weight) <= steps * (2 ** (bits - 1) - 1)
    assert (off[within] <= steps[within] * 0.5001).all()
    assert (values[0] == 0).all()


def test_scales_of_fp16_do_not_become_zero() -> None:
    values, scales = quantize_signed(np.full((1, 64), 1e-8, np.float32), 4, ir.DataType.FLOAT16)
    assert (scales > 0).all()
    assert (values == 0).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_of_nan_shows(bits: int) -> None:
    weight = np.zeros((2, 64), np.float32)
    weight[1, 7] = np.nan
    _, scales = quantize_signed(weight, bits, ir.DataType.BFLOAT16)
    assert np.isnan(scales[1]).any()  # so that the smoke test notices
    assert np.isfinite(scales[0]).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inputs", [147, 588])
def test_inputs_that_fill_no_blocks_have_8_bits_and_a_scale_per_output(tmp_path: Path, bits: int, inputs: int) -> None:
    """The patch embedding of 7 and of 14 pixels."""
    weight = RNG.standard_normal((26, inputs), dtype=np.float32)
    x = RNG.standard_normal((5, inputs), dtype=np.float32)
    y, tensors = product_of_file(linear_model(weight, BlockedWeights(bits)), x, tmp_path / "m.onnx")
    values = numpy_helper.to_array(tensors[f"{NAME}.weight.int8"]).astype(np.float32)  # [inputs, outputs]
    scales = numpy_helper.to_array(tensors[f"{NAME}.weight.scale"])
    assert scales.shape == (26,)
    np.testing.assert_allclose(y, x @ (values * scales), rtol=1e-4, atol=1e-4)
    assert np.linalg.norm(values * scales - weight.T) < 0.01 * np.linalg.norm(weight)


def test_an_odd_number_of_4_bit_outputs_is_an_error() -> None:
    with pytest.raises(EngineError, match=f"{NAME} has 31 outputs.* choose int8-weight-only"):
        linear_model(np.ones((31, 64), np.float32), BlockedWeights(4))
    linear_model(np.ones((31, 64), np.float32), BlockedWeights(8))


@pytest.mark.parametrize("bits", [8, 4])
def test_tied_lm_head_has_weights_of_its_own(tmp_path: Path, bits: int) -> None:
    table = RNG.standard_normal((48, 64), dtype=np.float32)
    x = RNG.standard_normal((3, 64), dtype=np.float32)
    graph = StageGraph("tied", OneWeight(table), BlockedWeights(bits))
    weight = LinearWeight("language_model.model.embed_tokens.weight", (OneWeight(table),))
    embedding = Embedding(graph.stored(weight.name, weight.shape, weight.blocks), weight)
    y = graph.tied_linear(graph.input("x", FLOAT, ["n", 64]), embedding)
    graph.output(y, "y", ["n", 48])
    actual, tensors = product_of_file(graph.model(), x, tmp_path / "m.onnx")
    values, scales = quantize_signed(table, bits, FLOAT)
    restored = values * np.repeat(scales, BLOCK[bits], axis=1)
    np.testing.assert_allclose(actual, x @ restored.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(numpy_helper.to_array(tensors[weight.name]), table)


@pytest.mark.parametrize("name", ["int8-weight-only", "int4-weight-only"])
def test_a_recipe_has_the_form_of_the_backend(name: str) -> None:
    precisions = dict.fromkeys(COMPONENTS, name)
    unread = cast(Checkpoint, None)  # only SmoothQuant reads it
    for form, operator in ((WeightForm.ONNXRUNTIME, "MatMulNBits"), (WeightForm.TENSORRT, "DequantizeLinear")):
        recipe = quantised(unread, precisions, None, 0, form)
        model = linear_model(np.ones((8, 64), np.float32), recipe.weight_format)
        assert operator in {node.op_type for node in model.graph}


@pytest.mark.parametrize("bits", [8, 4])
def test_dequantize_linear_is_directly_in_front_of_matmul(bits: int) -> None:
    model = linear_model(np.ones((8, 64), np.float32), BlockedWeights(bits))
    (product,) = [node for node in model.graph if node.op_type == "MatMul"]
    restored = known(known(product.inputs[1]).producer())
    assert restored.op_type == "DequantizeLinear"
    assert {name: value.as_int() for name, value in restored.attributes.items()} == {
        "axis": 0,
        "block_size": BLOCK[bits],
    }
    assert len(restored.inputs) == 2  # no zero point
