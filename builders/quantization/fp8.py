"""Writes fp8: W8A8 in E4M3 numbers, with one scale per tensor of activations and one per output channel of weights.

    x ~ scale_x * e4m3(x / scale_x),  scale_x = largest |x| / 448        w ~ scale_w * e4m3(w / scale_w), by row

448 is the largest E4M3 number. E4M3 keeps its relative precision over 14 octaves, so neither clipping nor SmoothQuant
gains anything. Weights that a checkpoint stores in E4M3 keep their numbers and scales.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.builders.graphs.common import FLOAT, FLOAT8, Embedding, LinearWeight, StageGraph
from nvlm_trt.builders.quantization.calibration import LinearInputs
from nvlm_trt.builders.quantization.rows import QuantisedWeight, nonzero, rounded
from nvlm_trt.builders.quantization.source_scales import weight_scales

LARGEST = 448
_SCALE_ERROR = 2**-8  # of bfloat16's rounding; E4M3 rounds by up to 2**-4


class Fp8:
    """Writes QuantizeLinear and DequantizeLinear around a float32 MatMul.

    `fold_weights` writes the weight's DequantizeLinear as Cast and Mul, which give the same numbers. TensorRT fuses
    DequantizeLinear. ONNX Runtime folds Cast and Mul into a constant when it loads the model. With
    DequantizeLinear, ONNX Runtime would compute the weight anew in every run, at 20 times the cost, and would multiply
    one row in another order than several rows, so the last bits of a request would depend on the rest of its batch."""

    def __init__(self, calibration: LinearInputs, fold_weights: bool) -> None:
        self._calibration = calibration
        self._fold_weights = fold_weights

    def matmul(self, graph: StageGraph, x: ir.Value, weight: LinearWeight) -> ir.Value:
        outputs, inputs = weight.shape
        dtype = graph.dtype
        known = weight_scales(weight)
        quantised = QuantisedWeight(weight, lambda rows, place: _quantised(rows, dtype, known[place]))
        values = graph.stored(f"{weight.name}.fp8", (inputs, outputs), quantised.values, FLOAT8, transposed=True)
        scales = graph.stored(f"{weight.name}.scale", (outputs,), quantised.scales)
        largest = self._calibration.of(weight.name, inputs).abs_max
        x_scale = graph.float_constant(f"{weight.name}.input_scale", largest / LARGEST)
        zero = graph.constant(f"{weight.name}.input_zero_point", np.array(0, FLOAT8.numpy()))
        op = graph.op
        x = op.DequantizeLinear(op.QuantizeLinear(x, x_scale, zero), x_scale, zero)
        if self._fold_weights:
            return op.MatMul(x, op.Mul(op.Cast(values, to=FLOAT), scales))
        zeros = graph.constant(f"{weight.name}.zero_point", np.zeros(outputs, FLOAT8.numpy()))
        return op.MatMul(x, op.DequantizeLinear(values, scales, zeros, axis=1))

    def tied_matmul(self, graph: StageGraph, x: ir.Value, embedding: Embedding) -> ir.Value:
        return self.matmul(graph, x, embedding.weight)


def row_scales(weight: FloatArray) -> FloatArray:
    """Compute the scales [outputs] of a weight [outputs, inputs]."""
    return nonzero(np.abs(weight).max(1) / np.float32(LARGEST))


def quantize(weight: FloatArray, scales: FloatArray) -> npt.NDArray[Any]:
    """Quantise [outputs, inputs] by scales [outputs] to E4M3 [outputs, inputs]."""
    # without the clip, a quotient that rounds to just above the largest number would become NaN
    return np.clip(weight / scales[:, None], -LARGEST, LARGEST).astype(FLOAT8.numpy())


def _quantised(rows: FloatArray, dtype: ir.DataType, known: FloatArray) -> tuple[npt.NDArray[Any], FloatArray]:
    """Quantise rows [n, inputs] to E4M3 [n, inputs] and the scales [n] that a graph of `dtype` stores.

    `known` [n]: scales with which an FP8 checkpoint stores these rows, NaN for rows that it does not. Divided by its
    own scale, a row gives the stored numbers back. `dtype` may round the scale: by less than the numbers were rounded
    when they were made, else the row is quantised anew."""
    scales = rounded(np.where(np.isnan(known), row_scales(rows), known), dtype)
    taken_over = np.abs(scales - known) <= known * np.float32(_SCALE_ERROR)
    return quantize(rows, np.where(taken_over, known, scales)), scales
