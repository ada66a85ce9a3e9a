"""Cuts the graph of a stage into pieces, one per layer, and a projector of two layers in two. The weights stay in the
stage's data file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from nvlm_trt.backends.onnxruntime import cpu
from nvlm_trt.backends.onnxruntime.cpu_graph import rewritten
from nvlm_trt.bounded_file import GRAPH_BYTES, read_bounded
from nvlm_trt.errors import EngineError

_COPIED_BYTES = 16 << 20  # at a time
# The nodes of a layer, and those of the cross-attention block before it, have names with these beginnings
# (StageGraph.scope). The last node of each returns the residual stream.
_LAYER = re.compile(r"(layers\.\d+)(/cross_layers\.\d+)?/")

Shape = Sequence[int | str]


@dataclass(frozen=True)
class Piece:
    """Part of a graph. Takes what the piece before it returns, with inputs of the stage; returns what flows to the next
    piece, the residual stream as a rule, or the outputs of the stage."""

    model: ModelProto
    takes: str | None  # among the inputs; None: the first piece
    returns: str  # among the outputs
    weight_bytes: int  # in the stage's data file

    @property
    def inputs(self) -> list[str]:
        return [value.name for value in self.model.graph.input]

    def write(self, file: Path, data: Path) -> None:
        """Write the piece as an ONNX file with its weights beside it, copied from the stage's data file `data`."""
        model = ModelProto()
        model.CopyFrom(self.model)
        with data.open("rb") as source, file.with_name(data.name).open("wb") as target:
            for tensor in model.graph.initializer:
                stored = {entry.key: entry for entry in tensor.external_data}
                if stored:
                    source.seek(int(stored["offset"].value))
                    stored["offset"].value = str(target.tell())
                    _copy(source, target, int(stored["length"].value))
        file.write_bytes(model.SerializeToString())


def cut(path: Path, result: str, residual: Shape, projected: Shape = ()) -> list[Piece]:
    """Cut the graph of a stage before its first layer, behind each layer and cross-attention block, and behind the
    activation of a projector.

    `result`: the output of the stage that is no cache; `residual`: shape of the residual stream; `projected`: of what
    the activation of a projector returns.

    Raises EngineError for a file that cannot be read, or whose layers share more than the residual stream."""
    try:
        model = rewritten(path, cpu.saturates(), cpu.single_rows_differ())
        model = model or ModelProto.FromString(read_bounded(path, GRAPH_BYTES))
    except (OSError, DecodeError) as error:
        raise EngineError(f"cannot read {path} ({error}); rebuild the engine with `nvlm-trt build`") from None
    ends = _ends(model.graph)
    if not ends:
        raise EngineError(f"{path} does not name its layers; rebuild the engine with `nvlm-trt build`")
    inner = _activations(model.graph)
    shapes = {**dict.fromkeys(ends, residual), **dict.fromkeys(inner, projected)}
    cuts = [*ends, *inner]
    return [_piece(path, model, start, end, shapes) for start, end in zip([None, *cuts], [*cuts, result], strict=True)]


def _ends(graph: GraphProto) -> list[str]:
    """Return the names of the residual stream before the first layer, and behind each layer and block, in order."""
    last: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        if match := _LAYER.match(node.name):
            last[match[1]] = last[match[0]] = index
    if not last:
        return []
    first = next(index for index, node in enumerate(graph.node) if _LAYER.match(node.name))
    return [graph.node[index].output[0] for index in sorted({first - 1, *last.values()})]


def _activations(graph: GraphProto) -> list[str]:
    """Return the names of what the activations behind the last layer return."""
    last = max(index for index, node in enumerate(graph.node) if _LAYER.match(node.name))
    return [node.output[0] for node in graph.node[last:] if node.op_type == "Gelu" and not _LAYER.match(node.name)]


def _piece(path: Path, model: ModelProto, start: str | None, end: str, shapes: Mapping[str, Shape]) -> Piece:
    graph = model.graph
    nodes = _needed(graph, start, end)
    if start is not None:
        begin = next(index for index, node in enumerate(graph.node) if start in node.output)
        if any(_LAYER.match(graph.node[index].name) for index in nodes if index <= begin):
            raise EngineError(f"{path} cannot be cut before {end}; rebuild the engine with `nvlm-trt build`")
    piece = ModelProto()
    piece.CopyFrom(model)
    kept = piece.graph
    for field in ("node", "initializer", "input", "output", "value_info"):
        kept.ClearField(field)
    kept.node.extend(graph.node[index] for index in nodes)
    reads = {name for node in kept.node for name in _reads(node)}
    writes = {name for node in kept.node for name in node.output}
    kept.initializer.extend(tensor for tensor in graph.initializer if tensor.name in reads)
    kept.input.extend(value for value in graph.input if value.name in reads)
    if start is not None:
        kept.input.append(_value(start, shapes[start]))
    kept.output.extend(value for value in graph.output if value.name in writes)
    if all(value.name != end for value in kept.output):
        kept.output.append(_value(end, shapes[end]))
    return Piece(piece, start, end, sum(_stored_bytes(tensor) for tensor in kept.initializer))


def _needed(graph: GraphProto, start: str | None, end: str) -> list[int]:
    """Return the nodes that compute `end` from `start` and the inputs of the graph, in order."""
    producers = {name: index for index, node in enumerate(graph.node) for name in node.output}
    needed: set[int] = set()
    wanted, seen = [end], {start}
    while wanted:
        name = wanted.pop()
        if name not in seen and name in producers:
            index = producers[name]
            needed.add(index)
            wanted.extend(_reads(graph.node[index]))
        seen.add(name)
    return sorted(needed)


def _reads(node: NodeProto) -> Iterator[str]:
    """Yield the names that a node reads, those that its branches read included."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield from (value.name for value in attribute.g.output)
            for inner in attribute.g.node:
                yield from _reads(inner)


def _value(name: str, shape: Shape) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _copy(source: BinaryIO, target: BinaryIO, length: int) -> None:
    while length:
        block = source.read(min(length, _COPIED_BYTES))
        target.write(block)
        length -= len(block)


def _stored_bytes(tensor: TensorProto) -> int:
    return next((int(entry.value) for entry in tensor.external_data if entry.key == "length"), 0)
