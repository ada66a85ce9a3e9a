"""int8: the numbers of numpy and onnx's evaluator, the form that TensorRT takes, the kernels that ONNX Runtime runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from one_linear import calibration_of, known, linear_model, optimised_operators, run, run_reference

from nvlm_trt.builders.quantization.int8 import Int8, quantize, search_scales

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((24, 64), dtype=np.float32)
X = RNG.standard_normal((5, 64), dtype=np.float32)


def expected(x: np.ndarray, weight: np.ndarray, clip: float) -> np.ndarray:
    """Compute in float64 by the formulas in int8.py; the weight's scales are the format's own."""
    x_scale, w_scale = np.float32(clip / 127), search_scales(weight)
    q_x = np.clip(np.rint(x / x_scale), -128, 127).astype(np.float64)
    q_w = np.clip(np.rint(weight / w_scale[:, None]), -127, 127).astype(np.float64)
    return (q_x @ q_w.T) * x_scale.astype(np.float64) * w_scale.astype(np.float64)


@pytest.mark.parametrize("clip", [None, 1.5], ids=["abs max", "clipped"])
@pytest.mark.parametrize("in_branch", [False, True], ids=["main graph", "branch"])
def test_equals_numpy(clip: float | None, in_branch: bool) -> None:
    """Holds with VNNI, which adds up in 32 bits, and without, where the session makes the weights unsigned."""
    calibration = calibration_of(X, clip)
    y = run(linear_model(WEIGHT, Int8(calibration), in_branch), X)
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y, expected(X, WEIGHT, clip or np.abs(X).max()), rtol=1e-5, atol=1e-5)
    relative = np.linalg.norm(y - X @ WEIGHT.T) / np.linalg.norm(X @ WEIGHT.T)
    assert 1e-4 < relative < (0.02 if clip is None else 0.3)


def test_equals_the_standard() -> None:
    model = linear_model(WEIGHT, Int8(calibration_of(X)))
    y = run_reference(model, X)
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y, run(model, X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_branch", [False, True], ids=["main graph", "branch"])
def test_runs_as_an_integer_product(tmp_path: Path, in_branch: bool) -> None:
    operators = optimised_operators(linear_model(WEIGHT, Int8(calibration_of(X)), in_branch), tmp_path)
    assert operators.count("MatMulIntegerToFloat") == 1
    assert not {"MatMul", "DequantizeLinear"} & set(operators)


def test_form_for_tensorrt() -> None:
    """DequantizeLinear is directly in front of MatMul; scales are per tensor and per output channel, zero points 0."""
    model = linear_model(WEIGHT, Int8(calibration_of(X)))
    (product,) = [node for node in model.graph if node.op_type == "MatMul"]
    activation, weight = (known(known(value).producer()) for value in product.inputs)
    assert activation.op_type == weight.op_type == "DequantizeLinear"
    rounding = known(known(activation.inputs[0]).producer())
    assert rounding.op_type == "QuantizeLinear"
    assert weight.attributes["axis"].as_int() == 1
    assert list(known(known(weight.inputs[1]).shape)) == [24]
    for node in (activation, rounding, weight):
        zero = known(known(node.inputs[2]).const_value)
        assert zero.dtype == ir.DataType.INT8
        assert not zero.numpy().any()
    assert known(known(activation.inputs[1]).const_value).numpy().shape == ()


@given(st.integers(0, 2**32 - 1), st.floats(-30, 30), st.integers(1, 4), st.integers(1, 40))
def test_searched_scales_lose_no_more_than_the_largest_magnitude(
    seed: int, exponent: float, outputs: int, inputs: int
) -> None:
    weight = np.random.default_rng(seed).standard_t(2, (outputs, inputs)).astype(np.float32)
    weight *= np.float32(2.0**exponent)
    scales, largest = search_scales(weight), np.abs(weight).max(1) / np.float32(127)
    assert (scales > 0).all()
    for row, scale, plain in zip(weight, scales, largest, strict=True):
        errors = [quantize(row[None], np.array([s]))[0].astype(np.float64) * s - row for s in (scale, plain)]
        searched, fallback = (np.square(error).sum() for error in errors)
        assert searched <= fallback * 1.001 + 1e-12 * np.square(row).sum()


def test_an_outlier_is_clipped_where_that_costs_less() -> None:
    weight = np.random.default_rng(0).standard_normal((1, 65536), dtype=np.float32)
    weight[0, 0] = 2 * np.abs(weight).max()
    assert search_scales(weight)[0] < 0.95 * weight[0, 0] / 127


def test_rows_of_zeros_and_of_nan() -> None:
    weight = np.zeros((3, 8), np.float32)
    weight[1, 3] = np.nan
    weight[2] = 1
    scales = search_scales(weight)
    assert scales[0] == 1
    assert np.isnan(scales[1])  # so that the smoke test notices
    np.testing.assert_allclose(quantize(weight, scales)[2] * scales[2], 1, rtol=1e-6)
