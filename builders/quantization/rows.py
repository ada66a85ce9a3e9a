"""Quantises weights a few rows at a time, values and scales at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.builders.graphs.common import LinearWeight

Quantise = Callable[[FloatArray, slice], tuple[npt.NDArray[Any], FloatArray]]


class QuantisedWeight:
    """Makes the blocks of two stored tensors, a weight's values and its scales, and reads the weight once for both.

    A graph saves its tensors in the order in which they were stored. `values` keeps the scales for the next call of
    `scales`. Without a call of `values` for all rows before, `scales` reads the weight again."""

    def __init__(self, weight: LinearWeight, quantise: Quantise) -> None:
        """`quantise` turns rows [n, inputs], and the slice of the weight that they are, into values [n, ...] and scales
        [n, ...]."""
        self._weight, self._quantise = weight, quantise
        self._scales: list[FloatArray] | None = None

    def values(self, first: int = 0) -> Iterator[npt.NDArray[Any]]:
        """Yield the values of the rows from `first` on."""
        scales = []
        for values, of_rows in self._quantised(first):
            scales.append(of_rows)
            yield values
        self._scales = scales if first == 0 else None

    def scales(self, first: int = 0) -> Iterable[FloatArray]:
        """Return the scales of the rows from `first` on."""
        scales, self._scales = self._scales, None
        return scales if scales and first == 0 else (of_rows for _, of_rows in self._quantised(first))

    def _quantised(self, first: int) -> Iterator[tuple[npt.NDArray[Any], FloatArray]]:
        for rows in self._weight.blocks(first):
            yield self._quantise(rows, slice(first, first + len(rows)))
            first += len(rows)


def nonzero(scales: FloatArray) -> FloatArray:
    """Replace scales of 0 by 1: zeros stay zeros at any scale."""
    return np.where(scales == 0, np.float32(1), scales).astype(np.float32)


def rounded(scales: FloatArray, dtype: ir.DataType) -> FloatArray:
    """Round scales to `dtype`, as the graph stores them: weights are quantised and restored by the same scale.

    Scales that would become 0 become the smallest number of `dtype`: fp16 ends at 6e-8."""
    with np.errstate(over="ignore"):  # the graph names a scale that is not finite
        stored = scales.astype(dtype.numpy()).astype(np.float32)
    smallest = np.float32(ml_dtypes.finfo(dtype.numpy()).smallest_subnormal)
    return np.where((stored == 0) & (scales != 0), np.copysign(smallest, scales), stored)
