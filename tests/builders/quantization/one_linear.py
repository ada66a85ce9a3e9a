"""Builds a graph of one linear layer in some weight format, and runs it in several ways."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from stages import session

from nvlm_trt.builders.graphs.common import FLOAT, StageGraph, WeightFormat
from nvlm_trt.builders.quantization.calibration import Calibration, LinearInput

NAME = "language_model.model.layers.0.mlp.up_proj"
T = TypeVar("T")


class OneWeight:
    """`WeightSource` of a single weight [outputs, inputs], and the stored tensor itself."""

    def __init__(self, weight: np.ndarray) -> None:
        self.shape = weight.shape
        self._weight = weight

    def take(self, name: str) -> OneWeight:
        assert name == f"{NAME}.weight"
        return self

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self._weight[start:stop]


def calibration_of(x: np.ndarray, clip: float | None = None) -> Calibration:
    """Make a calibration of NAME with the inputs x [n, inputs]."""
    channels = np.abs(x).max(0)
    largest = float(channels.max())
    linear = LinearInput(abs_max=largest, clip=clip or largest, channels=channels.tolist())
    return Calibration(checkpoint_digest="0" * 64, samples={"count": 1, "digest": ""}, linears={NAME: linear})


def linear_model(weight: np.ndarray, weight_format: WeightFormat, in_branch: bool = False) -> ir.Model:
    """Build x [n, inputs] -> y [n, outputs]; `in_branch`: in an If whose condition holds for n > 0."""
    graph = StageGraph("linear", OneWeight(weight), weight_format)
    x = graph.input("x", FLOAT, ["n", weight.shape[1]])
    if in_branch:
        rows = graph.op.Squeeze(graph.op.Shape(x, start=0, end=1))
        y = graph.when(graph.op.Greater(rows, 0), lambda branch: branch.linear(x, NAME), otherwise=x)
    else:
        y = graph.linear(x, NAME)
    graph.output(y, "y", ["n", weight.shape[0]])
    return graph.model()


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    return session(model).run(["y"], {"x": x})[0]


def run_reference(model: ir.Model, x: np.ndarray) -> np.ndarray:
    """Run with onnx's own evaluator, which computes as the standard says."""
    outputs = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    assert isinstance(outputs, list)
    return outputs[0]


def optimised_operators(model: ir.Model, folder: Path) -> list[str]:
    """List the operators that ONNX Runtime runs, also in branches."""
    path = folder / "optimised.onnx"
    session(model, path)
    return list(_operators(onnx.load(path).graph))


def known(value: T | None) -> T:
    """Return a value that has to be there."""
    assert value is not None
    return value


def _operators(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _operators(attribute.g)
