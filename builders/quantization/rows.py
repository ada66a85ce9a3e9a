"""Weights quantised a few rows at a time, values and scales at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.builders.graphs.common import LinearWeight

Quantise = Callable[[FloatArray], tuple[npt.NDArray[Any], FloatArray]]


class QuantisedWeight:
    """The blocks of two stored tensors, a weight's values and its scales, for which the weight is read once.

    A graph saves its tensors in the order in which they were stored. If the values come first, the scales are left over
    from them until they are saved as well; scales that are asked for before are made by a reading of their own."""

    def __init__(self, weight: LinearWeight, quantise: Quantise) -> None:
        """`quantise`: some rows [n, inputs] -> their values [n, ...] and scales [n, ...]."""
        self._weight, self._quantise = weight, quantise
        self._scales: list[FloatArray] | None = None

    def values(self) -> Iterator[npt.NDArray[Any]]:
        scales = []
        for rows in self._weight.blocks():
            values, of_rows = self._quantise(rows)
            scales.append(of_rows)
            yield values
        self._scales = scales

    def scales(self) -> Iterable[FloatArray]:
        scales, self._scales = self._scales, None
        return scales or (self._quantise(rows)[1] for rows in self._weight.blocks())


def nonzero(scales: FloatArray) -> FloatArray:
    """Scales with 1 in place of 0: what is all zeros stays zeros whatever its scale."""
    return np.where(scales == 0, np.float32(1), scales).astype(np.float32)


def rounded(scales: FloatArray, dtype: ir.DataType) -> FloatArray:
    """Scales as a graph of `dtype` stores them: what is quantised by the stored scale is restored by it."""
    return scales.astype(dtype.numpy()).astype(np.float32)
