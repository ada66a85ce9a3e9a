"""Runs the graphs of plans on a CPU, so that a build without a GPU can try and judge an engine before it is published.

The weights, the scales and every operator are those of the plans, in the same files. Numbers between operators are
float32: ONNX Runtime has no kernels for bfloat16 on a CPU.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, TensorProto, helper

from nvlm_trt.backends.base import BackendArray, FloatArray
from nvlm_trt.backends.onnxruntime.backend import OnnxRuntimeBackend

_HALF = (TensorProto.BFLOAT16, TensorProto.FLOAT16)
_STORED = "stored."  # in front of the name of an initializer in half precision


class GraphsOnCpu(OnnxRuntimeBackend):
    """Implements `StepBackend` over widened graphs, in which image_tokens has at least one row."""

    def _rows(self, embeddings: BackendArray) -> FloatArray:
        rows = super()._rows(embeddings)
        return rows if len(rows) else np.zeros((1, self.config.llm.hidden_size), np.float32)


def widen_file(path: Path) -> None:
    """Widen an ONNX file in place; its weights stay where they are."""
    model = onnx.load(path, load_external_data=False)
    widen(model)
    path.write_bytes(model.SerializeToString())


def widen(model: ModelProto) -> None:
    """Make every tensor in half precision float32, except the stored weights, which a Cast converts: ONNX Runtime
    computes the Casts once, when it loads the model."""
    _widen(model.graph)
    for function in model.functions:
        _widen(function)


def _widen(body: GraphProto | FunctionProto) -> None:
    """Widen a graph or function, and the branches in it."""
    for node in body.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in _HALF:
                attribute.i = TensorProto.FLOAT
            elif attribute.type == AttributeProto.TENSOR and attribute.t.data_type in _HALF:
                array = onnx.numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(array, attribute.t.name))
            elif attribute.type == AttributeProto.GRAPH:
                _widen(attribute.g)
    if isinstance(body, GraphProto):
        _widen_values(body)


def _widen_values(graph: GraphProto) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in _HALF:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type in _HALF:
            name = tensor.name
            tensor.name = _STORED + name
            casts.append(helper.make_node("Cast", [tensor.name], [name], f"widen {name}", to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
