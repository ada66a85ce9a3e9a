"""Makes ONNX models of a few nodes, one of which is NODE."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import TensorProto, helper, numpy_helper

NODE = "the node"
OPSETS = [helper.make_opsetid("", 24), helper.make_opsetid("nvlm", 1), helper.make_opsetid("com.microsoft", 1)]


def value(name: str, kind: int = TensorProto.FLOAT, shape: Sequence[int | str] = (2, 3)) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def node(kind: str, inputs: str, outputs: str = "y", domain: str = "", name: str = NODE, **attributes: object):
    names = [item.strip("-") for item in inputs.split()]
    return helper.make_node(kind, names, outputs.split(), name, domain=domain, **attributes)


def model(nodes, inputs, outputs=None, constants=None, functions=()) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        inputs,
        outputs or [value("y")],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=OPSETS, functions=functions, ir_version=11)
