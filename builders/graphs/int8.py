"""8-bit weights with 32-bit scales: a third of fp32's bytes per decoded token, which is what bounds decoding."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.builders.graphs.common import UINT8, Embedding, LinearWeight, StageGraph
from nvlm_trt.errors import ConfigError

BLOCK = 32
_ZERO_POINT = 128  # MatMulNBits stores unsigned numbers
_INT8_ACTIVATIONS = 4  # accuracy_level: multiply in int8; the float kernel of 8-bit weights is far slower


class Int8WeightOnly:
    """Each block of 32 inputs of an output shares a symmetric scale, its largest magnitude / 127.

    The node is ONNX Runtime's MatMulNBits. It quantises activations too, every row for itself: a request's result does
    not depend on its neighbours. The standard blocked DequantizeLinear, which it would be fused from, is not used
    because the fusion fails on weights of an If branch.
    """

    precision = "int8-weight-only"

    def matmul(self, graph: StageGraph, x: ir.Value, weight: LinearWeight) -> ir.Value:
        outputs, inputs = weight.shape
        if inputs % BLOCK:
            raise ConfigError(
                f"{weight.name} has {inputs} inputs, {self.precision} needs a multiple of {BLOCK}; build with fp32"
            )
        blocks = inputs // BLOCK
        values = graph.stored(
            f"{weight.name}.int8", (outputs, blocks, BLOCK), lambda: quantize(weight.load())[0], UINT8
        )
        scales = graph.stored(f"{weight.name}.scale", (outputs, blocks), lambda: quantize(weight.load())[1])
        return graph.microsoft.MatMulNBits(
            x, values, scales, K=inputs, N=outputs, bits=8, block_size=BLOCK, accuracy_level=_INT8_ACTIVATIONS
        )

    def tied_matmul(self, graph: StageGraph, x: ir.Value, embedding: Embedding) -> ir.Value:
        return self.matmul(graph, x, embedding.weight)


def quantize(weight: FloatArray) -> tuple[npt.NDArray[np.uint8], FloatArray]:
    """[outputs, inputs] -> uint8 [outputs, blocks, 32], scales [outputs, blocks]: weight = (uint8 - 128) * scale."""
    blocks = weight.reshape(len(weight), -1, BLOCK)
    scales = np.abs(blocks).max(-1) / np.float32(127)
    scales[scales == 0] = 1
    return (np.rint(blocks / scales[..., None]) + _ZERO_POINT).astype(np.uint8), scales
