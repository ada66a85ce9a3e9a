"""lm_head in 8 bits with a scale per row: the numbers of numpy, and rows that do not depend on each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from one_linear import linear_model, optimised_operators, run, run_reference

from nvlm_trt.builders.quantization.int8 import search_scales
from nvlm_trt.builders.quantization.row_scaled import RowScaled

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((31, 100), dtype=np.float32)
X = RNG.standard_normal((33, 100), dtype=np.float32) * RNG.uniform(1e-3, 1e3, (33, 1)).astype(np.float32)
MODEL = linear_model(WEIGHT, RowScaled())


def expected(x: np.ndarray) -> np.ndarray:
    """Compute in float64 by the formulas in row_scaled.py."""
    scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
    weight_scale = search_scales(WEIGHT)[:, None]
    q_weight = np.clip(np.rint(WEIGHT / weight_scale), -127, 127).astype(np.float64)
    return np.rint(x / scale).astype(np.float64) @ q_weight.T * scale.astype(np.float64) * weight_scale.T


def test_equals_numpy() -> None:
    y = run(MODEL, X)
    assert np.isfinite(y).all()
    error = np.abs(y - expected(X)).max(1) / np.abs(y).max(1)  # one rounding of x may fall to the other side
    assert error.max() < 2e-3
    assert np.median(error) < 1e-6
    exact = X @ WEIGHT.T
    assert 1e-4 < np.linalg.norm(y[0] - exact[0]) / np.linalg.norm(exact[0]) < 0.02


def test_equals_the_standard() -> None:
    np.testing.assert_allclose(run_reference(MODEL, X[:4]), run(MODEL, X[:4]), rtol=1e-4, atol=1e-4 * X[:4].max())


def test_runs_as_an_integer_product(tmp_path: Path) -> None:
    operators = optimised_operators(MODEL, tmp_path)
    assert operators.count("MatMulIntegerToFloat") == 1
    assert not {"MatMul", "DequantizeLinear"} & set(operators)


def test_a_row_has_the_same_bits_alone_and_among_others() -> None:
    alone = np.concatenate([run(MODEL, row[None]) for row in X])
    for rows in (2, 3, 8, 33):
        np.testing.assert_array_equal(run(MODEL, X[:rows]), alone[:rows])


def test_a_row_that_is_not_finite_spoils_itself_alone() -> None:
    spoiled = X[:3].copy()
    spoiled[1, 7] = np.nan
    y = run(MODEL, spoiled)
    assert np.isnan(y[1]).all()
    np.testing.assert_array_equal(y[[0, 2]], run(MODEL, X[[0, 2]]))
    spoiled[1, 7] = np.inf
    assert not np.isfinite(run(MODEL, spoiled)[1]).any()


def test_rows_of_zeros_and_no_rows() -> None:
    assert np.array_equal(run(MODEL, np.zeros((2, 100), np.float32)), np.zeros((2, 31), np.float32))
    assert run(MODEL, X[:0]).shape == (0, 31)
