"""Rewrites the graph of a stage for CPUs on which ONNX Runtime's kernels have faults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto
from onnx.parser import parse_function

from nvlm_trt.bounded_file import GRAPH_BYTES, read_bounded

# Multiplies the first row of each matrix twice where a single row would be left: the kernel for two rows or more gives
# the same bits for any number of rows. Each thread takes 128 rows, so 129 rows leave a single row too.
_PAIRED = """
<domain: "nvlm", opset_import: ["": {opset}, "com.microsoft": 1]>
MatMulNBits <K, N, bits, block_size, accuracy_level> (x, values, scales) => (y)
{{
    outer = Shape <start = 0, end = -1> (x)
    rows = ReduceProd (outer)
    piece = Constant <value_ints = [128]> ()
    rest = Mod (rows, piece)
    one = Constant <value_ints = [1]> ()
    single = Equal (rest, one)
    extra = Cast <to = 7> (single)
    zero = Constant <value_ints = [0]> ()
    axis = Constant <value_ints = [-2]> ()
    first = Slice (x, zero, extra, axis)
    paired = Concat <axis = -2> (first, x)
    product = com.microsoft.MatMulNBits <K: int = @K, N: int = @N, bits: int = @bits, block_size: int = @block_size,
        accuracy_level: int = @accuracy_level> (paired, values, scales)
    end = Constant <value_ints = [9223372036854775807]> ()
    y = Slice (product, extra, end, axis)
}}
"""


def rewritten(path: Path, saturates: bool, single_rows_differ: bool) -> ModelProto | None:
    """Return the graph of an ONNX file as a CPU with these faults needs it; its weights stay on disk.

    Returns None if the file needs no change, or cannot be read: ONNX Runtime then says why."""
    try:
        content = read_bounded(path, GRAPH_BYTES)  # without weights: small
        integer_products = saturates and b"MatMulIntegerToFloat" in content
        small_weights = single_rows_differ and b"MatMulNBits" in content
        if not (integer_products or small_weights):
            return None
        model = ModelProto.FromString(content)
    except (OSError, DecodeError):
        return None
    if integer_products:
        move_weights_into_branches(model)
    if small_weights:
        pair_single_rows(model)
    return model


def move_weights_into_branches(model: ModelProto) -> None:
    """Move the weights of integer products from the main graph into the branches of an If that use them.

    The session option against saturation turns weights into unsigned bytes, whose kernel does not saturate, but it only
    finds weights in the graph that the node is in."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for graph in _branches(model.graph):
        for node in graph.node:
            if node.op_type == "MatMulIntegerToFloat" and node.input[1] in weights:
                tensor = weights.pop(node.input[1])
                graph.initializer.append(tensor)
                model.graph.initializer.remove(tensor)


def pair_single_rows(model: ModelProto) -> None:
    """Make every product of 4-bit weights multiply at least two rows."""
    nodes = [node for graph in (model.graph, *_branches(model.graph)) for node in graph.node if _is_4_bit(node)]
    if not nodes:
        return
    for node in nodes:
        node.domain = "nvlm"
    (opset,) = (entry.version for entry in model.opset_import if entry.domain == "")
    model.functions.append(parse_function(_PAIRED.format(opset=opset)))


def _is_4_bit(node: NodeProto) -> bool:
    return node.op_type == "MatMulNBits" and any(a.name == "bits" and a.i == 4 for a in node.attribute)


def _branches(graph: GraphProto) -> Iterator[GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
                yield from _branches(attribute.g)
