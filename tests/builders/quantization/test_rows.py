"""Quantising reads a weight once for its values and its scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_linear import NAME, calibration_of, linear_model

from nvlm_trt.builders.graphs import streamed
from nvlm_trt.builders.graphs.common import LinearWeight, WeightFormat
from nvlm_trt.builders.model_file import save_model
from nvlm_trt.builders.quantization.blocked_weights import BlockedWeights
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

    quantised = QuantisedWeight(LinearWeight(f"{NAME}.weight", (Part(),)), lambda rows: (rows, rows.max(1)))
    expected = WEIGHT.max(1)
    np.testing.assert_array_equal(np.concatenate(list(quantised.scales())), expected)
    list(quantised.values())
    for _ in range(2):
        np.testing.assert_array_equal(np.concatenate(list(quantised.scales())), expected)
