"""Writes int8-weight-only for lm_head: integer products like int8's, but each row of activations has its own scale.

s_x = max|x| / 127 of one row                w ~ scale_w * q_w, as in int8.py
y = s_x * scale_w * sum(q_x * q_w),          q_x = rint(x / s_x)

The runtime computes s_x, so no calibration is needed, and a row's bits do not depend on the rows beside it.
"""

from __future__ import annotations

import onnx_ir as ir

from nvlm_trt.builders.graphs.common import Embedding, LinearWeight, StageGraph
from nvlm_trt.builders.quantization.int8 import LARGEST, integer_product

_SMALLEST = 1e-30  # a row of zeros has a scale, too


class RowScaled:
    """Multiplies eight rows in half the time of MatMulNBits, which applies a scale per block of inputs.

    The operators around the product take as long as a small layer's product: they are for lm_head."""

    def matmul(self, graph: StageGraph, x: ir.Value, weight: LinearWeight) -> ir.Value:
        op = graph.op
        largest = op.ReduceMax(op.Abs(x), [-1], keepdims=1)  # [..., 1]
        # ReduceMax ignores NaN, ReduceSum does not: logits that are not finite have to be noticed
        poison = op.Mul(op.ReduceSum(x, [-1], keepdims=1), op.Constant(value_float=0.0))
        scale = op.Add(op.Div(largest, op.Constant(value_float=float(LARGEST))), op.Constant(value_float=_SMALLEST))
        product = integer_product(graph, op.Div(x, scale), weight, input_scale=1.0)
        return op.Mul(product, op.Add(scale, poison))

    def tied_matmul(self, graph: StageGraph, x: ir.Value, embedding: Embedding) -> ir.Value:
        return self.matmul(graph, x, embedding.weight)
