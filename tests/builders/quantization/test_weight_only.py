"""8- and 4-bit weights: the numbers themselves, and the products that MatMulNBits computes with them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from one_linear import linear_model, run

from nvlm_trt.builders.quantization.weight_only import BLOCK, WeightOnly, pack, quantize


def restore(values: np.ndarray, scales: np.ndarray, bits: int, inputs: int) -> np.ndarray:
    offset = 2 ** (bits - 1)
    return ((values.astype(np.float32) - offset) * scales[..., None]).reshape(len(values), -1)[:, :inputs]


@given(st.integers(0, 2**32 - 1), st.floats(-30, 30), st.integers(1, 4), st.integers(1, 100))
def test_8_bits_are_at_most_half_a_step_off_and_zero_is_exact(
    seed: int, exponent: float, outputs: int, inputs: int
) -> None:
    weight = np.random.default_rng(seed).standard_normal((outputs, inputs), dtype=np.float32)
    weight *= np.float32(2.0**exponent)
    weight[:, ::5] = 0
    values, scales = quantize(weight, 8)
    restored = restore(values, scales, 8, inputs)
    assert np.isfinite(restored).all()
    steps = np.repeat(scales, BLOCK[8], axis=1)[:, :inputs]
    assert (np.abs(restored - weight) <= steps * 0.5001).all()
    assert (restored[:, ::5] == 0).all()


@given(st.integers(0, 2**32 - 1), st.floats(-30, 30), st.integers(1, 4), st.integers(1, 100))
def test_4_bits_lose_less_than_with_the_plain_scale(seed: int, exponent: float, outputs: int, inputs: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((outputs, inputs), dtype=np.float32)
    weight *= np.float32(2.0**exponent)
    values, scales = quantize(weight, 4)
    assert values.max() < 16
    error = np.square((restore(values, scales, 4, inputs) - weight).astype(np.float64)).sum()
    plain = np.pad(weight, ((0, 0), (0, -inputs % BLOCK[4]))).reshape(outputs, -1, BLOCK[4])
    step = np.abs(plain).max(-1, keepdims=True) / 7
    rounded = np.rint(plain / np.where(step == 0, 1, step)) * step
    assert error <= np.square((rounded - plain).astype(np.float64)).sum() * 1.001


@pytest.mark.parametrize("bits", [8, 4])
def test_a_block_of_zeros_and_one_of_nan(bits: int) -> None:
    weight = np.zeros((2, BLOCK[bits]), np.float32)
    weight[1, 7] = np.nan
    values, scales = quantize(weight, bits)
    assert (values[0] == 2 ** (bits - 1)).all()
    assert scales[0] > 0
    assert np.isnan(scales[1]).all()  # so that the smoke test notices


def test_4_bit_numbers_are_packed_low_half_first() -> None:
    assert pack(np.array([[1, 2, 15, 0]], np.uint8), 4).tolist() == [[0x21, 0x0F]]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inputs", [128, 64, 147, 33, 5])
@pytest.mark.parametrize("in_branch", [False, True], ids=["main graph", "branch"])
def test_multiplies_by_the_restored_weight(bits: int, inputs: int, in_branch: bool) -> None:
    """The activations of every block are exact in the 8 bits to which MatMulNBits rounds them."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((24, inputs), dtype=np.float32)
    x = rng.integers(-127, 128, (5, inputs)).astype(np.float32)
    x[:, :: BLOCK[bits]] = 127
    y = run(linear_model(weight, WeightOnly(bits), in_branch), x)
    expected = x.astype(np.float64) @ restore(*quantize(weight, bits), bits, inputs).T.astype(np.float64)
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("inputs", "outputs"), [(896, 200), (512, 96), (100, 31)])
def test_a_row_has_the_same_bits_alone_and_among_others(bits: int, inputs: int, outputs: int) -> None:
    """ONNX Runtime has other kernels for one row than for several; with larger blocks, their sums differ.

    Holds with AVX-512, where both kernels add up these blocks in one order; without it no 4-bit row is alone."""
    rng = np.random.default_rng(0)
    model = linear_model(rng.standard_normal((outputs, inputs), dtype=np.float32), WeightOnly(bits), in_branch=False)
    x = rng.standard_normal((33, inputs), dtype=np.float32)
    alone = np.concatenate([run(model, row[None]) for row in x])
    assert np.isfinite(alone).all()
    for rows in (2, 3, 4, 8, 33):
        np.testing.assert_array_equal(run(model, x[:rows]), alone[:rows])
