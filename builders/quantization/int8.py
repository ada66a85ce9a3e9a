"""Writes int8: W8A8 with integer products, one scale per tensor of activations, one per output channel of weights.

x ~ scale_x * q_x,  q_x = clip(rint(x / scale_x), -128, 127),  scale_x = clip / 127
w ~ scale_w * q_w,  q_w = clip(rint(w / scale_w), -127, 127),  scale_w minimises the row's squared error
y = scale_x * scale_w * sum(q_x * q_w): no offsets; the sum is exact, in int32
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.builders.graphs.common import INT8, UINT8, Embedding, LinearWeight, StageGraph
from nvlm_trt.builders.quantization.calibration import LinearInputs
from nvlm_trt.builders.quantization.rows import QuantisedWeight, nonzero, rounded

LARGEST = 127
# Fractions of a row's largest magnitude that are tried as the row's clipping point. A row without outliers keeps 1.
# Below 0.5, the clipped values would lose more than all other values gain.
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)


class Int8:
    """Writes standard QuantizeLinear and DequantizeLinear around MatMul, the form that TensorRT takes.

    ONNX Runtime fuses these nodes to MatMulIntegerToFloat if the graph states the activation's zero point, and shifts
    activations to unsigned numbers, for which its kernel is 60 times as fast. ONNX Runtime does neither for weights in
    an If branch, so this class writes the fused node there: the same numbers, shifted by 128."""

    def __init__(self, calibration: LinearInputs) -> None:
        self._calibration = calibration

    def matmul(self, graph: StageGraph, x: ir.Value, weight: LinearWeight) -> ir.Value:
        clip = self._calibration.of(weight.name, weight.shape[1]).clip
        return integer_product(graph, x, weight, clip / LARGEST)

    def tied_matmul(self, graph: StageGraph, x: ir.Value, embedding: Embedding) -> ir.Value:
        return self.matmul(graph, x, embedding.weight)


def integer_product(graph: StageGraph, x: ir.Value, weight: LinearWeight, input_scale: float) -> ir.Value:
    """Multiply x [..., inputs], quantised by `input_scale`, by the quantised weight: [..., outputs]."""
    outputs, inputs = weight.shape
    dtype = graph.dtype
    quantised = QuantisedWeight(weight, lambda rows, _: quantize_rows(rows, dtype))
    values = graph.stored(f"{weight.name}.int8", (inputs, outputs), quantised.values, INT8, transposed=True)
    scales = graph.stored(f"{weight.name}.scale", (outputs,), quantised.scales)
    x_scale = graph.float_constant(f"{weight.name}.input_scale", input_scale)
    op = graph.op
    if graph.in_branch:
        zero = graph.constant(f"{weight.name}.input_zero_point", np.array(128, UINT8.numpy()))
        x = op.QuantizeLinear(x, x_scale, zero)
        return graph.microsoft.MatMulIntegerToFloat(x, values, x_scale, scales, zero)
    zero = graph.constant(f"{weight.name}.input_zero_point", np.array(0, INT8.numpy()))
    x = op.DequantizeLinear(op.QuantizeLinear(x, x_scale, zero), x_scale, zero)
    zeros = graph.constant(f"{weight.name}.zero_point", np.zeros(outputs, INT8.numpy()))
    return op.MatMul(x, op.DequantizeLinear(values, scales, zeros, axis=1))


def search_scales(weight: FloatArray) -> FloatArray:
    """Find the scales [outputs] of a weight [outputs, inputs]: each row's clipping point of least squared error."""
    largest = np.abs(weight).max(1)
    scales = np.empty(len(weight), np.float32)
    best = np.full(len(weight), np.inf, np.float32)
    for clip in _CLIPS:
        candidate = nonzero(largest * np.float32(clip / LARGEST))
        error = np.square(quantize(weight, candidate) * candidate[:, None] - weight).sum(1)
        better = error < best
        best = np.where(better, error, best)
        scales = np.where(better, candidate, scales)
    return np.where(
        np.isfinite(largest), scales, np.float32(np.nan)
    )  # the smoke test must notice weights that are not finite


def quantize(weight: FloatArray, scales: FloatArray) -> npt.NDArray[np.int8]:
    """Quantise [outputs, inputs] by scales [outputs] to int8 [outputs, inputs] in -127..127."""
    quotient = np.rint(weight / scales[:, None])
    with np.errstate(invalid="ignore"):  # a row with NaN has a scale of NaN
        return np.clip(quotient, -LARGEST, LARGEST).astype(np.int8)


def quantize_rows(rows: FloatArray, dtype: ir.DataType) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """Quantise rows [n, inputs] to int8 [n, inputs] and the scales [n] that a graph of `dtype` stores."""
    scales = rounded(search_scales(rows), dtype)
    return quantize(rows, scales), scales
