"""Shapes that depend on values: the node is refused in the main graph, in branches and in functions."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from small_models import NODE, OPSETS, model, node, value

from nvlm_trt.backends.plans.linter import lint


def used_only(where: str = "main graph"):
    """Makes a slice of x up to the largest number in `ranges`, as GatedCrossAttention's function does."""
    nodes = [
        node("ReduceMax", "ranges", "most", name="most", keepdims=0),
        node("Unsqueeze", "most zero", "end", name="end"),
    ]
    nodes.append(node("Slice", "x zero end zero", "z" if where == "branch" else "y"))
    inputs = [value("x"), value("ranges", TensorProto.INT64, ["B", 2])]
    outputs, functions = [value("y", shape=["used", 3])], []
    if where == "branch":
        then = helper.make_graph([nodes.pop()], "then", [], [value("z", shape=["used", 3])])
        other = helper.make_graph(
            [node("Identity", "x", "z", name="pass")], "else", [], [value("z", shape=["used", 3])]
        )
        nodes += rows_above_zero("some")
        nodes.append(node("If", "some", name="branch", then_branch=then, else_branch=other))
    elif where == "function":
        body = helper.make_function("nvlm", "Used", ["x", "end", "zero"], ["y"], [nodes.pop()], OPSETS)
        nodes.append(node("Used", "x end zero", domain="nvlm", name="call"))
        functions = [body]
    return model(nodes, inputs, outputs, {"zero": np.array([0], np.int64)}, functions)


def rows_above_zero(name: str):
    """Makes a condition that follows from the shape of x."""
    return [
        node("Shape", "x", "rows", name="shape", start=0, end=1),
        node("Squeeze", "rows", "row", name="squeeze"),
        node("Cast", "row", name, name="condition", to=TensorProto.BOOL),
    ]


def shape_by_value(kind: str, inputs: str):
    """Makes one node of x, n (a number), ns (numbers), zero and one."""
    values = [value("x"), value("n", TensorProto.INT64, []), value("ns", TensorProto.INT64, [2])]
    kinds = {"Range": TensorProto.INT64}
    outputs = [value("y", kinds.get(kind, TensorProto.FLOAT), [f"d{i}" for i in range(1 if kind == "Range" else 2)])]
    constants = {"zero": np.int64(0), "one": np.int64(1)}
    return model([node(kind, inputs)], values, outputs, constants)


def if_by_value():
    branches = {
        f"{name}_branch": helper.make_graph([node("Identity", "x", "z", name=name)], name, [], [value("z")])
        for name in ("then", "else")
    }
    return model([node("If", "c", **branches)], [value("c", TensorProto.BOOL, []), value("x")])


def loop(rounds: str, condition: str = "true"):
    """Makes a sum over `rounds`: "n", an input's value, or "count", a constant. Its body computes `condition`."""
    body = helper.make_graph(
        [
            node("Add", "total x", "next", name="add"),
            node("ReduceSum", "next", "all", name="sum", keepdims=0),
            node("Cast", "all" if condition == "sum" else "ok", "go", name="cast", to=TensorProto.BOOL),
        ],
        "body",
        [value("i", TensorProto.INT64, []), value("ok", TensorProto.BOOL, []), value("total")],
        [value("go", TensorProto.BOOL, []), value("next")],
    )
    constants = {"count": np.int64(3), "true": np.bool_(True)}
    inputs = [value("x"), value("n", TensorProto.INT64, [])]
    return model([node("Loop", f"{rounds} true x", body=body)], inputs, None, constants)


def by_shape():
    """Makes shapes in the main graph, a branch and a function that all follow from the shape of x."""
    branches = {
        f"{kind}_branch": helper.make_graph([node("Expand", "x shape", "z", name=kind)], kind, [], [value("z")])
        for kind in ("then", "else")
    }
    nodes = [
        *rows_above_zero("some"),
        node("Shape", "x", "shape", name="shape of x"),
        node("Size", "x", "count", name="size"),
        node("Range", "zero count one", "positions", name="positions of x"),
        node("Reshape", "positions shape", "grid", name="grid"),
        node("Cast", "grid", "numbers", name="cast", to=TensorProto.FLOAT),
        node("If", "some", "chosen", name="branch", **branches),
        node("Grown", "chosen shape", "grown", domain="nvlm", name="call"),
        node("Add", "grown numbers", name="add"),
    ]
    grow = helper.make_function("nvlm", "Grown", ["a", "s"], ["b"], [node("Expand", "a s", "b", name="grow")], OPSETS)
    constants = {"zero": np.int64(0), "one": np.int64(1)}
    return model(nodes, [value("x")], None, constants, [grow])


REFUSED = {
    "Slice by value": (used_only(), "the shape of Slice's output depends on the value of end"),
    "Slice by value in a branch": (used_only("branch"), "value of end, which no CUDA graph"),
    "Range by value": (shape_by_value("Range", "zero n one"), "the value of n"),
    "Reshape by value": (shape_by_value("Reshape", "x ns"), "the value of ns"),
    "Expand by value": (shape_by_value("Expand", "x ns"), "the value of ns"),
    "ConstantOfShape by value": (shape_by_value("ConstantOfShape", "ns"), "the value of ns"),
    "ReduceMax over axes by value": (shape_by_value("ReduceMax", "x ns"), "the value of ns"),
    "If by value": (if_by_value(), "what If runs depends on the value of c"),
    "Loop by value": (loop("n"), "what Loop runs depends on the value of n"),
    "Loop until a value": (loop("count", "sum"), "what Loop runs depends on the value of go"),
    "NonZero": (model([node("NonZero", "x")], [value("x")], [value("y", TensorProto.INT64)]), "CUDA graph"),
}


@pytest.mark.parametrize(("refused", "fragment"), REFUSED.values(), ids=REFUSED)
def test_refuses(refused: onnx.ModelProto, fragment: str) -> None:
    (finding,) = lint(refused)
    assert finding.node == NODE
    assert fragment in finding.problem
    assert finding.remedy


ACCEPTED = {
    "shapes by shape": by_shape(),
    "values that decide no shape": shape_by_value("Gather", "x ns"),
    "Loop of constant length": loop("count"),
}


@pytest.mark.parametrize("accepted", ACCEPTED.values(), ids=ACCEPTED)
def test_accepts(accepted: onnx.ModelProto) -> None:
    assert lint(accepted) == []


def test_a_node_of_a_function_is_named_with_its_call() -> None:
    (finding,) = lint(used_only("function"))
    assert finding.node == f"{NODE} in call"
    assert "the shape of Slice's output depends on the value of end" in finding.problem


def test_a_function_is_judged_by_its_arguments() -> None:
    """The same function, called with the shape of x, passes."""
    made = used_only("function")
    call = next(item for item in made.graph.node if item.op_type == "Used")
    made.graph.node.insert(0, node("Shape", "x", "rows", name="rows", start=0, end=1))
    call.input[1] = "rows"
    assert lint(made) == []
