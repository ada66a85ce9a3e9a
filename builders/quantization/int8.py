"""int8: W8A8, integer products. One scale per tensor of activations, one per output channel of weights, no offsets.

x ~ scale_x * q_x,  q_x = clip(rint(x / scale_x), -128, 127),  scale_x = clip / 127
w ~ scale_w * q_w,  q_w = clip(rint(w / scale_w), -127, 127),  scale_w minimises the row's squared error
y = scale_x * scale_w * sum(q_x * q_w), the sum in int32, hence exact
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.builders.graphs.common import INT8, UINT8, Embedding, LinearWeight, StageGraph
from nvlm_trt.builders.quantization.calibration import Calibration
from nvlm_trt.builders.quantization.rows import nonzero, rounded, row_chunks

LARGEST = 127
# Fractions of a row's largest magnitude tried as its clipping point. A row without outliers keeps 1; below a half the
# clipped values would cost more than all the others gain.
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)


class Int8:
    """Standard QuantizeLinear and DequantizeLinear around MatMul, the form that TensorRT takes.

    ONNX Runtime fuses it to MatMulIntegerToFloat if the activation's zero point is spelled out, and shifts activations
    to unsigned numbers, for which its kernel is 60 times as fast. It does neither to weights in an If branch, so there
    the fused node is written: the same numbers, shifted by 128."""

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration

    def matmul(self, graph: StageGraph, x: ir.Value, weight: LinearWeight) -> ir.Value:
        outputs, inputs = weight.shape
        quantised = _Quantised(weight, graph.dtype)
        values = graph.stored(f"{weight.name}.int8", (inputs, outputs), quantised.values, INT8)
        scales = graph.stored(f"{weight.name}.scale", (outputs,), quantised.scales)
        clip = self._calibration.of(weight.name, inputs).clip
        x_scale = graph.float_constant(f"{weight.name}.input_scale", clip / LARGEST)
        op = graph.op
        if graph.in_branch:
            zero = graph.constant(f"{weight.name}.input_zero_point", np.array(128, UINT8.numpy()))
            x = op.QuantizeLinear(x, x_scale, zero)
            return graph.microsoft.MatMulIntegerToFloat(x, values, x_scale, scales, zero)
        zero = graph.constant(f"{weight.name}.input_zero_point", np.array(0, INT8.numpy()))
        x = op.DequantizeLinear(op.QuantizeLinear(x, x_scale, zero), x_scale, zero)
        zeros = graph.constant(f"{weight.name}.zero_point", np.zeros(outputs, INT8.numpy()))
        return op.MatMul(x, op.DequantizeLinear(values, scales, zeros, axis=1))

    def tied_matmul(self, graph: StageGraph, x: ir.Value, embedding: Embedding) -> ir.Value:
        return self.matmul(graph, x, embedding.weight)


class _Quantised:
    """A weight as two stored tensors: the scales, which are small, are searched once for both."""

    def __init__(self, weight: LinearWeight, dtype: ir.DataType) -> None:
        self._weight, self._dtype = weight, dtype
        self._scales: FloatArray | None = None

    def scales(self) -> FloatArray:
        """[outputs]"""
        if self._scales is None:
            self._scales = rounded(search_scales(self._weight.load()), self._dtype)
        return self._scales

    def values(self) -> npt.NDArray[np.int8]:
        """[inputs, outputs], as MatMul wants it."""
        scales = self.scales()
        return quantize(self._weight.load(), scales).T


def search_scales(weight: FloatArray) -> FloatArray:
    """[outputs, inputs] -> [outputs]: of the clipping points tried, the one of least squared error for each row."""
    scales = np.empty(len(weight), np.float32)
    for rows in row_chunks(weight):
        part = weight[rows]
        largest = np.abs(part).max(1)
        best = np.full(len(part), np.inf, np.float32)
        for clip in _CLIPS:
            candidate = nonzero(largest * np.float32(clip / LARGEST))
            error = np.square(quantize(part, candidate) * candidate[:, None] - part).sum(1)
            better = error < best
            best = np.where(better, error, best)
            scales[rows] = np.where(better, candidate, scales[rows])
        scales[rows] = np.where(np.isfinite(largest), scales[rows], np.nan)  # a weight that is not finite must show
    return scales


def quantize(weight: FloatArray, scales: FloatArray) -> npt.NDArray[np.int8]:
    """[outputs, inputs] by [outputs] -> int8 [outputs, inputs] in -127..127."""
    values = np.empty(weight.shape, np.int8)
    for rows in row_chunks(weight):
        quotient = np.rint(weight[rows] / scales[rows, None])
        with np.errstate(invalid="ignore"):  # NaN: its row's scale is NaN too
            values[rows] = np.clip(quotient, -LARGEST, LARGEST)
    return values
