"""Finds shapes that depend on values: a CUDA graph does not record them, and each costs a read from the device.

Data are the values of a graph's inputs and all that is computed from them. The shape of data is not data: it follows
from the shapes of the graph's inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from onnx import FunctionProto, GraphProto, NodeProto

Functions = Mapping[tuple[str, str], FunctionProto]  # by (domain, name)
Problem = tuple[str, str, str]  # node, problem, remedy

_STANDARD_DOMAINS = ("", "ai.onnx")
_ALWAYS = ("NonZero", "Unique", "NonMaxSuppression", "Compress")
# operator -> the inputs whose values decide the output's shape; of the other operators, the axes of Reduce... do
_SHAPE_INPUTS: dict[str, tuple[int, ...]] = {
    "AffineGrid": (1,),
    "BlackmanWindow": (0,),
    "CenterCropPad": (1,),
    "Col2Im": (1, 2),
    "ConstantOfShape": (0,),
    "DFT": (1, 2),
    "Expand": (1,),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "MaxUnpool": (2,),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (2, 3),
    "STFT": (1, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "SplitToSequence": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
}
_RUNS = {"If": (0,), "Loop": (0, 1)}  # operator -> the inputs whose values decide what runs, or how often


def value_shapes(graph: GraphProto, functions: Functions) -> Iterator[Problem]:
    """Yield (node, problem, remedy) in the order of the nodes, also in branches and in the bodies of `functions`.

    A node of a function that `functions` lacks, such as a plugin, counts as an operator whose shapes depend on shapes
    only. A node of a function's body is named with the node that calls the function."""
    constants = {tensor.name for tensor in graph.initializer}
    data = {value.name for value in graph.input} - constants
    return _Body(functions, data).walk(graph.node)


class _Body:
    """The nodes of one graph, branch or function body, and the names of data there."""

    def __init__(
        self, functions: Functions, data: Iterable[str], outer: _Body | None = None, caller: str | None = None
    ) -> None:
        """`data`: the inputs that are data. `outer`: the body around a branch, whose names the branch sees."""
        self.functions, self.data, self.outer, self.caller = functions, set(data), outer, caller

    def walk(self, nodes: Iterable[NodeProto]) -> Iterator[Problem]:
        """Yield the problems of `nodes`. Afterwards, the names of data are known."""
        for node in nodes:
            if node.domain in _STANDARD_DOMAINS:
                yield from self._check(node)
            function = self.functions.get((node.domain, node.op_type))
            graphs = [graph for attribute in node.attribute for graph in (attribute.g, *attribute.graphs) if graph.node]
            if function is not None:
                yield from self._call(node, function)
            elif node.op_type == "If" and graphs:
                yield from self._branches(node, graphs)
            elif graphs:
                yield from self._loop(node, graphs)
            elif node.op_type not in ("Shape", "Size") and any(map(self.is_data, node.input)):
                self.data.update(node.output)

    def is_data(self, name: str) -> bool:
        return name in self.data or (self.outer is not None and self.outer.is_data(name))

    def _where(self, node: NodeProto) -> str:
        name = node.name or f"the node of {node.output[0]}"
        return f"{name} in {self.caller}" if self.caller else name

    def _check(self, node: NodeProto) -> Iterator[Problem]:
        kind, where = node.op_type, self._where(node)
        decisive = (1,) if kind.startswith("Reduce") else _SHAPE_INPUTS.get(kind, ())
        if kind in _ALWAYS:
            yield (
                where,
                f"the shape of {kind}'s output depends on values, which no CUDA graph records",
                "compute positions instead, as the decoder does with CumSum",
            )
        for name in self._data_among(node, decisive):
            yield (
                where,
                f"the shape of {kind}'s output depends on the value of {name}, which no CUDA graph records",
                "take the shape from Shape and mask what is unused, as MaskedAttention does",
            )
        for name in self._data_among(node, _RUNS.get(kind, ())):
            yield self._runs_by_value(node, name)

    def _runs_by_value(self, node: NodeProto, name: str) -> Problem:
        return (
            self._where(node),
            f"what {node.op_type} runs depends on the value of {name}, which no CUDA graph records",
            "compute all of it and select with Where",
        )

    def _data_among(self, node: NodeProto, places: Iterable[int]) -> list[str]:
        """Return the first of a node's inputs at `places` that is data, as a list of at most one name."""
        names = [node.input[place] for place in places if place < len(node.input)]
        return [name for name in names if self.is_data(name)][:1]

    def _call(self, node: NodeProto, function: FunctionProto) -> Iterator[Problem]:
        arguments = zip(function.input, node.input, strict=False)  # a call may leave out the last inputs
        data = {inside for inside, outside in arguments if self.is_data(outside)}
        body = _Body(self.functions, data, caller=self._where(node))
        yield from body.walk(function.node)
        results = zip(node.output, function.output, strict=False)
        self.data.update(outside for outside, inside in results if body.is_data(inside))

    def _branches(self, node: NodeProto, branches: Iterable[GraphProto]) -> Iterator[Problem]:
        by_value = self.is_data(node.input[0])
        for branch in branches:
            body = _Body(self.functions, (), self, self.caller)
            yield from body.walk(branch.node)
            results = zip(node.output, branch.output, strict=True)
            self.data.update(outside for outside, inside in results if by_value or body.is_data(inside.name))

    def _loop(self, node: NodeProto, graphs: Iterable[GraphProto]) -> Iterator[Problem]:
        """Walk the body of Loop, Scan or SequenceMap. All that it carries counts as data, from the first round on."""
        for graph in graphs:
            names = [value.name for value in graph.input]
            data = set(names)
            if node.op_type == "Loop":  # (the round, the condition, what is carried)
                data = set(names[2:]) | {
                    name for name, given in zip(names, node.input[:2], strict=False) if self.is_data(given)
                }
            body = _Body(self.functions, data, self, self.caller)
            yield from body.walk(graph.node)
            if node.op_type == "Loop" and body.is_data(graph.output[0].name) and not self.is_data(node.input[1]):
                yield self._runs_by_value(node, graph.output[0].name)
        self.data.update(node.output)
