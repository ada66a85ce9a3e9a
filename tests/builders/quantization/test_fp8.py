"""fp8: the numbers of ml_dtypes and onnx's evaluator."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from one_linear import calibration_of, known, linear_model, optimised_operators, run, run_reference

from nvlm_trt.builders.quantization.fp8 import Fp8, quantize, row_scales

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((24, 64), dtype=np.float32)
X = RNG.standard_normal((5, 64), dtype=np.float32)


def e4m3(values: np.ndarray, scale: np.ndarray | np.float32) -> np.ndarray:
    clipped = np.clip(values / scale, -448, 448)
    return clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * np.float64(scale)


@pytest.mark.parametrize("in_branch", [False, True], ids=["main graph", "branch"])
@pytest.mark.parametrize("fold_weights", [False, True])
def test_equals_ml_dtypes(fold_weights: bool, in_branch: bool) -> None:
    y = run(linear_model(WEIGHT, Fp8(calibration_of(X), fold_weights), in_branch), X)
    x_scale = np.float32(np.abs(X).max() / 448)
    w_scale = np.abs(WEIGHT).max(1, keepdims=True) / np.float32(448)
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y, e4m3(X, x_scale) @ e4m3(WEIGHT, w_scale).T, rtol=1e-5, atol=1e-5)
    assert 1e-3 < np.linalg.norm(y - X @ WEIGHT.T) / np.linalg.norm(X @ WEIGHT.T) < 0.06


@pytest.mark.parametrize("fold_weights", [False, True])
def test_equals_the_standard(fold_weights: bool) -> None:
    model = linear_model(WEIGHT, Fp8(calibration_of(X), fold_weights))
    np.testing.assert_allclose(run_reference(model, X), run(model, X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_branch", [False, True], ids=["main graph", "branch"])
def test_weights_are_folded_when_the_model_is_loaded(tmp_path: Path, in_branch: bool) -> None:
    operators = optimised_operators(
        linear_model(WEIGHT, Fp8(calibration_of(X), fold_weights=True), in_branch), tmp_path
    )
    assert not {"Cast", "Mul"} & set(operators)
    assert operators.count("DequantizeLinear") == 1  # on the activations


def test_form_for_tensorrt() -> None:
    model = linear_model(WEIGHT, Fp8(calibration_of(X), fold_weights=False))
    (product,) = [node for node in model.graph if node.op_type == "MatMul"]
    activation, weight = (known(known(value).producer()) for value in product.inputs)
    assert activation.op_type == weight.op_type == "DequantizeLinear"
    assert weight.attributes["axis"].as_int() == 1
    for node in (activation, known(known(activation.inputs[0]).producer()), weight):
        assert known(known(node.inputs[2]).const_value).dtype == ir.DataType.FLOAT8E4M3FN


def test_inputs_beyond_the_calibration_saturate() -> None:
    """E4M3 has no infinity: an overflow would be NaN."""
    y = run(linear_model(WEIGHT, Fp8(calibration_of(X), fold_weights=True)), 100 * X)
    assert np.isfinite(y).all()


@given(st.integers(0, 2**32 - 1), st.floats(-30, 30))
def test_weights_are_finite_and_within_a_sixteenth(seed: int, exponent: float) -> None:
    weight = np.random.default_rng(seed).standard_normal((4, 40), dtype=np.float32) * np.float32(2.0**exponent)
    weight[0] = 0
    scales = row_scales(weight)
    restored = quantize(weight, scales).astype(np.float32) * scales[:, None]
    assert np.isfinite(restored).all()
    # half a unit of 3 mantissa bits, or of the smallest number
    assert (np.abs(restored - weight) <= np.maximum(np.abs(weight) / 16, 2.0**-10 * scales[:, None]) * 1.001).all()
