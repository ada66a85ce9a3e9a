"""Writes int8-weight-only and int4-weight-only: small weights, because reading weights limits the speed of decoding.

A block is BLOCK[bits] inputs of one output, and has one symmetric scale: weight ~ (stored - offset) * scale, where
`stored` is unsigned and offset = 2 ** (bits - 1). Zeros fill up a last block that has fewer inputs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.builders.graphs.common import FLOAT, UINT8, Embedding, LinearWeight, StageGraph
from nvlm_trt.builders.quantization.rows import QuantisedWeight, nonzero, rounded
from nvlm_trt.model.precision import BLOCK

_INT8_ACTIVATIONS = 4  # accuracy_level: multiply in int8; the float kernels are far slower
# Scales that are tried for a 4-bit block, as fractions of the scale at which the block's largest magnitude fills the
# range; 8/7 uses -7..7. For normally distributed weights, the search has 0.91 times the squared error of the fraction 1
# alone, and 0.71 times the squared error of 8/7 alone.
_FRACTIONS = (0.75, 0.8, 0.85, 0.9, 0.95, 1, 1.05, 1.1, 8 / 7)


class WeightOnly:
    """Writes ONNX Runtime's MatMulNBits.

    MatMulNBits also quantises activations, each row by itself, so a request's result does not depend on its batch.
    (On CPUs without AVX-512, this holds because backends/onnxruntime/cpu_graph.py multiplies no row alone.) ONNX
    Runtime could fuse MatMulNBits from the standard blocked DequantizeLinear, but not for weights of an If branch, so
    this class writes the fused node."""

    def __init__(self, bits: int) -> None:
        assert bits in (4, 8), "MatMulNBits has fast kernels for 4 and 8 bits"
        self._bits = bits

    def matmul(self, graph: StageGraph, x: ir.Value, weight: LinearWeight) -> ir.Value:
        outputs, inputs = weight.shape
        bits = self._bits
        block = BLOCK[bits]
        blocks = -(-inputs // block)
        quantised = QuantisedWeight(weight, lambda rows, _: _packed(rows, bits))
        shape = (outputs, blocks, block * bits // 8)
        values = graph.stored(f"{weight.name}.int{bits}", shape, quantised.values, UINT8)
        scales = graph.stored(f"{weight.name}.scale", (outputs, blocks), quantised.scales)
        return graph.microsoft.MatMulNBits(
            x, values, scales, K=inputs, N=outputs, bits=bits, block_size=block, accuracy_level=_INT8_ACTIVATIONS
        )

    def tied_matmul(self, graph: StageGraph, x: ir.Value, embedding: Embedding) -> ir.Value:
        return self.matmul(graph, x, embedding.weight)


def quantize(
    weight: FloatArray, bits: int, dtype: ir.DataType = FLOAT, positive: bool = False
) -> tuple[npt.NDArray[np.uint8], FloatArray]:
    """Quantise [outputs, inputs] to uint8 [outputs, blocks, BLOCK[bits]], 0..2**bits - 1; scales [outputs, blocks].

    The scales are numbers of `dtype`, all of them positive if `positive`."""
    outputs, inputs = weight.shape
    block = BLOCK[bits]
    blocks = np.pad(weight, ((0, 0), (0, -inputs % block))).reshape(outputs, -1, block)
    if bits == 4:
        scales = _search_int4(blocks, dtype, positive)
    else:
        scales = nonzero(rounded(np.abs(blocks).max(-1) / np.float32(127), dtype))
    return _round(blocks, scales, bits), scales


def pack(values: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Put two 4-bit numbers into a byte, the first in the low half; leave 8-bit numbers unchanged."""
    return values if bits == 8 else values[..., ::2] | np.left_shift(values[..., 1::2], 4, dtype=np.uint8)


def _packed(rows: FloatArray, bits: int) -> tuple[npt.NDArray[np.uint8], FloatArray]:
    """Quantise rows [n, inputs] for the graph: uint8 [n, blocks, BLOCK[bits] * bits / 8], scales [n, blocks]."""
    values, scales = quantize(rows, bits)
    return pack(values, bits), scales


def _search_int4(blocks: FloatArray, dtype: ir.DataType, positive: bool) -> FloatArray:
    """Find the scale of least squared error for each block of [outputs, blocks, 32].

    -8..7 has one more number below zero than above: a scale's sign makes the block's largest magnitude negative.
    `positive` scales leave a positive one at 7."""
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)[..., 0]
    scales = nonzero(-largest / np.float32(8))
    if positive:
        scales = np.abs(scales)
    best = np.full(scales.shape, np.inf, np.float32)
    full = scales.copy()
    for fraction in _FRACTIONS:
        candidate = nonzero(rounded(full * np.float32(fraction), dtype))
        restored = (_round(blocks, candidate, 4).astype(np.float32) - 8) * candidate[..., None]
        error = np.square(restored - blocks).sum(-1)
        better = error < best
        best = np.where(better, error, best)
        scales = np.where(better, candidate, scales)
    return scales


def _round(blocks: FloatArray, scales: FloatArray, bits: int) -> npt.NDArray[np.uint8]:
    offset = 2 ** (bits - 1)
    with np.errstate(invalid="ignore"):  # a block with NaN has a scale of NaN
        return np.clip(np.rint(blocks / scales[..., None]) + offset, 0, 2 * offset - 1).astype(np.uint8)
