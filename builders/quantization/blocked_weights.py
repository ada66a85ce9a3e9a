"""int8-weight-only and int4-weight-only in standard operators: weights that TensorRT reads in 8 or 4 bits.

A block is BLOCK[bits] inputs of one output, as in weight_only.py: weight ~ q * scale, q in -128..127 or -8..7. TensorRT
takes positive scales only, so a 4-bit block whose largest magnitude is positive does not use its -8: for normal
weights, the squared error of 4 bits is 0.80 times that of max|w| / 7, where scales of either sign leave 0.71.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.builders.graphs.common import INT4, INT8, Embedding, LinearWeight, StageGraph
from nvlm_trt.builders.quantization import int8
from nvlm_trt.builders.quantization.rows import QuantisedWeight
from nvlm_trt.builders.quantization.weight_only import quantize
from nvlm_trt.errors import EngineError
from nvlm_trt.model.precision import BLOCK

_TYPES = {8: INT8, 4: INT4}


class BlockedWeights:
    """Writes DequantizeLinear of a constant weight in front of MatMul. Activations stay in floating point.

    A layer whose inputs fill no whole blocks has 8-bit weights with one scale per output: [inputs, outputs] cannot be
    padded without padding the activations too. Of all linear layers of NVLM, that is the patch embedding alone (3 * 14
    * 14 = 588 inputs, a thousandth of the vision encoder): every other width is a multiple of 64."""

    def __init__(self, bits: int) -> None:
        assert bits in _TYPES, "TensorRT reads blocks of 4 and 8 bits"
        self._bits = bits

    def matmul(self, graph: StageGraph, x: ir.Value, weight: LinearWeight) -> ir.Value:
        inputs = weight.shape[1]
        whole = inputs % BLOCK[self._bits] == 0
        restored = self._blocks(graph, weight) if whole else _rows(graph, weight)
        return graph.op.MatMul(x, restored)  # [..., outputs]

    def tied_matmul(self, graph: StageGraph, x: ir.Value, embedding: Embedding) -> ir.Value:
        return self.matmul(graph, x, embedding.weight)

    def _blocks(self, graph: StageGraph, weight: LinearWeight) -> ir.Value:
        """Store a weight with one scale per block. Return it restored: [inputs, outputs]."""
        bits, dtype = self._bits, graph.dtype
        outputs, inputs = weight.shape
        if bits == 4 and outputs % 2:
            raise EngineError(
                f"{weight.name.removesuffix('.weight')} has {outputs} outputs, and 4-bit weights are stored in pairs; "
                "choose int8-weight-only for its component"
            )
        quantised = QuantisedWeight(weight, lambda rows, _: quantize_signed(rows, bits, dtype))
        name = f"{weight.name}.int{bits}"
        values = graph.stored(name, (inputs, outputs), quantised.values, _TYPES[bits], transposed=True)
        blocks = (inputs // BLOCK[bits], outputs)
        scales = graph.stored(f"{weight.name}.scale", blocks, quantised.scales, transposed=True)
        return graph.op.DequantizeLinear(values, scales, axis=0, block_size=BLOCK[bits])


def _rows(graph: StageGraph, weight: LinearWeight) -> ir.Value:
    """Store a weight in 8 bits with one scale per output. Return it restored: [inputs, outputs]."""
    dtype = graph.dtype
    outputs, inputs = weight.shape
    quantised = QuantisedWeight(weight, lambda rows, _: int8.quantize_rows(rows, dtype))
    values = graph.stored(f"{weight.name}.int8", (inputs, outputs), quantised.values, INT8, transposed=True)
    scales = graph.stored(f"{weight.name}.scale", (outputs,), quantised.scales)
    return graph.op.DequantizeLinear(values, scales, axis=1)


def quantize_signed(weight: FloatArray, bits: int, dtype: ir.DataType) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """Quantise [outputs, inputs], whole blocks, to int8 [outputs, inputs] and positive scales [outputs, blocks].

    The scales are numbers of `dtype`."""
    stored, scales = quantize(weight, bits, dtype, positive=True)
    values = stored.astype(np.int16) - 2 ** (bits - 1)
    return values.astype(np.int8).reshape(weight.shape), scales
