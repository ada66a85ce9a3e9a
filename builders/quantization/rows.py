"""Weights quantised a few rows at a time: what a quantiser needs on top of its input and output stays small."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from nvlm_trt.backends.base import FloatArray

_ELEMENTS = 1 << 20  # 4 MB of float32: temporaries stay in the cache


def row_chunks(weight: FloatArray) -> Iterator[slice]:
    """Slices of rows that cover a weight [outputs, inputs]."""
    step = max(1, _ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        yield slice(start, start + step)


def nonzero(scales: FloatArray) -> FloatArray:
    """Scales with 1 in place of 0: what is all zeros stays zeros whatever its scale."""
    return np.where(scales == 0, np.float32(1), scales).astype(np.float32)


def rounded(scales: FloatArray, dtype: ir.DataType) -> FloatArray:
    """Scales as a graph of `dtype` stores them: what is quantised by the stored scale is restored by it."""
    return scales.astype(dtype.numpy()).astype(np.float32)
