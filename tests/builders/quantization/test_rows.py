"""Quantising reads a weight once for its values and its scales."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from one_linear import NAME, calibration_of, linear_model

from nvlm_trt.builders.graphs import streamed
from nvlm_trt.builders.graphs.common import LinearWeight, WeightFormat
from nvlm_trt.builders.model_file import save_model
from nvlm_trt.builders.quantization import fp8, int8
from nvlm_trt.builders.quantization.blocked_weights import BlockedWeights, quantize_signed
from nvlm_trt.builders.quantization.fp8 import Fp8
from nvlm_trt.builders.quantization.int8 import Int8
from nvlm_trt.builders.quantization.rows import QuantisedWeight
from nvlm_trt.builders.quantization.weight_only import WeightOnly

WEIGHT = np.random.default_rng(0).standard_normal((300, 64), dtype=np.float32)
CALIBRATION = calibration_of(np.ones((1, 64), np.float32))


class Watched(np.ndarray):
    """An array that counts the rows that are read from it."""

    read = 0

    def __getitem__(self, key: Any) -> Any:
        rows = np.asarray(self)[key]
        Watched.read += len(rows)
        return rows


@pytest.mark.parametrize("in_branch", [False, True], ids=["main graph", "branch"])
@pytest.mark.parametrize(
    "weight_format",
    [
        Int8(CALIBRATION),
        Fp8(CALIBRATION, fold_weights=True),
        WeightOnly(8),
        WeightOnly(4),
        BlockedWeights(8),
        BlockedWeights(4),
    ],
    ids=["int8", "fp8", "int8-weight-only", "int4-weight-only", "int8 blocks", "int4 blocks"],
)
def test_saving_reads_a_weight_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight_format: WeightFormat, in_branch: bool
) -> None:
    """The saved bytes do not depend on the size of blocks."""
    saved = []
    for block in (1 << 20, 7 * 64):
        monkeypatch.setattr(streamed, "_BLOCK_ELEMENTS", block)
        monkeypatch.setattr(Watched, "read", 0)
        save_model(linear_model(WEIGHT.view(Watched), weight_format, in_branch), tmp_path / "m.onnx", lambda *_: None)
        assert Watched.read == len(WEIGHT)
        saved.append((tmp_path / "m.onnx.data").read_bytes())
    assert saved[0] == saved[1]


def test_scales_do_not_need_the_values_first() -> None:
    class Part:
        shape = WEIGHT.shape

        def rows(self, start: int, stop: int) -> np.ndarray:
            return WEIGHT[start:stop]

    quantised = QuantisedWeight(LinearWeight(f"{NAME}.weight", (Part(),)), lambda rows, _: (rows, rows.max(1)))
    expected = WEIGHT.max(1)
    np.testing.assert_array_equal(np.concatenate(list(quantised.scales())), expected)
    list(quantised.values())
    for _ in range(2):
        np.testing.assert_array_equal(np.concatenate(list(quantised.scales())), expected)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
@pytest.mark.parametrize(
    "quantise",
    [
        lambda rows, dtype: fp8._quantised(rows, dtype, np.full(len(rows), np.nan, np.float32)),
        int8.quantize_rows,
        lambda rows, dtype: quantize_signed(rows, 4, dtype),
    ],
    ids=["fp8", "int8", "int4 blocks"],
)
@given(exponent=st.integers(-140, 15), seed=st.integers(0, 9), zeros=st.integers(0, 64))
def test_rows_of_any_magnitude_stay_finite(
    quantise: Callable[..., tuple[np.ndarray, np.ndarray]], dtype: ir.DataType, exponent: int, seed: int, zeros: int
) -> None:
    """A row may be so small that its scale would be 0 in fp16, and 0 / 0 no number."""
    rows = np.random.default_rng(seed).standard_normal((3, 64), dtype=np.float32) * np.float32(2.0**exponent)
    rows[1, :zeros] = 0
    with np.errstate(all="raise", under="ignore"):
        values, scales = quantise(rows, dtype)
    restored = values.astype(np.float32).reshape(scales.size, -1) * scales.reshape(-1, 1)
    assert np.isfinite(restored).all()
    assert (scales != 0).all()
    # half a step of 4 bits, and 127 times what a scale of fp16's smallest numbers is off
    assert np.abs(restored.reshape(rows.shape) - rows).max() <= 0.15 * np.abs(rows).max() + 2.0**-18
