"""Builds a stage's ONNX graph: lazily loaded weights, linear layers, norms and the gated MLP.

Weights are named tensors of a checkpoint. Weights stay on disk until the finished model is saved, some rows at a time,
so the memory of a build depends neither on the size of the model nor on the size of a tensor.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxscript import GraphBuilder

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.builders.graphs.streamed import Blocks, StoredTensor, StreamedTensor, blocks_of
from nvlm_trt.builders.narrow import narrowed, place_of

Shape = Sequence[int | str]

# Opset 24 brought TensorScatter and Attention's nonpad_kv_seqlen. A graph that needs neither declares opset 23, because
# the last ONNX Runtime for Python 3.10 (1.23) refuses 24.
OPSET = 23
CACHE_OPSET = 24
_IR_VERSION = 11

FLOAT = ir.DataType.FLOAT
FLOAT8 = ir.DataType.FLOAT8E4M3FN
INT4 = ir.DataType.INT4
INT8 = ir.DataType.INT8
UINT8 = ir.DataType.UINT8
INT32 = ir.DataType.INT32
INT64 = ir.DataType.INT64

# what one part of a stage takes from the part before, and gives to the next
HIDDEN, HIDDEN_OUT = "hidden", "hidden_out"


class WeightSource(Protocol):
    """Hands out named tensors, each once, as `nvlm_trt.checkpoint.reader.Checkpoint` does."""

    def take(self, name: str) -> StoredTensor: ...


@dataclass(frozen=True)
class LinearWeight:
    """Holds the weight of one linear layer, [outputs, inputs] as in torch.nn.Linear: tensors stacked by rows."""

    name: str
    parts: tuple[StoredTensor, ...]
    names: tuple[str, ...] = ()  # of the parts; empty: the weight is one tensor of this name

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), math.prod(self.parts[0].shape[1:])

    @property
    def rows_of_parts(self) -> list[tuple[str, int]]:
        return [(name, part.shape[0]) for name, part in zip(self.names, self.parts, strict=False)]

    def blocks(self, first: int = 0) -> Iterator[FloatArray]:
        """Yield the rows from `first` on in order, [n, inputs] at a time."""
        return (rows.reshape(len(rows), -1) for rows in blocks_of(*self.parts, first=first))


@dataclass(frozen=True)
class Embedding:
    """Holds the embedding table [vocab, hidden], which is also the weight of a tied lm_head."""

    table: ir.Value
    weight: LinearWeight


class WeightFormat(Protocol):
    """Stores and multiplies the weights of linear layers."""

    def matmul(self, graph: StageGraph, x: ir.Value, weight: LinearWeight) -> ir.Value:
        """Multiply x [..., inputs] by the weight: [..., outputs]."""
        ...

    def tied_matmul(self, graph: StageGraph, x: ir.Value, embedding: Embedding) -> ir.Value:
        """Multiply x [B, hidden] by a weight that the graph already holds as the embedding table: [B, vocab]."""
        ...


class Unquantised:
    """Stores weights unchanged, transposed to MatMul's [inputs, outputs] on the way to disk."""

    def matmul(self, graph: StageGraph, x: ir.Value, weight: LinearWeight) -> ir.Value:
        outputs, inputs = weight.shape
        parts = weight.rows_of_parts
        stored = graph.stored(weight.name, (inputs, outputs), weight.blocks, transposed=True, parts=parts)
        return graph.op.MatMul(x, stored)

    def tied_matmul(self, graph: StageGraph, x: ir.Value, embedding: Embedding) -> ir.Value:
        # Gemm is as fast as MatMul with a transposed copy, and stores no copy beside the table.
        return graph.op.Gemm(x, embedding.table, transB=1)


class StageGraph:
    """Builds the graph of one stage, or a branch of the graph. `op` adds standard nodes, `microsoft` ONNX Runtime's."""

    def __init__(
        self,
        name: str,
        weights: WeightSource,
        weight_format: WeightFormat | None = None,
        opset: int = OPSET,
        dtype: ir.DataType = FLOAT,
    ) -> None:
        """`weight_format`: for linear layers, None: Unquantised. `dtype`: for weights, inputs and computation."""
        self.opset = opset
        self.dtype = dtype
        self.in_branch = False  # True in an If: ONNX Runtime does not fuse nodes whose weights are in a branch
        graph = ir.Graph([], [], nodes=[], opset_imports={"": opset, "com.microsoft": 1, "nvlm": 1}, name=name)
        self._builder = GraphBuilder(graph)
        self._weights = weights
        self._format = weight_format or Unquantised()

    @property
    def op(self) -> Any:
        return self._builder.op

    @property
    def microsoft(self) -> Any:
        return self._builder.opset("com.microsoft", 1)

    def input(self, name: str, dtype: ir.DataType, shape: Shape) -> ir.Value:
        return self._builder.input(name, dtype, list(shape))

    def output(self, value: ir.Value, name: str, shape: Shape) -> None:
        """Declare an output of the graph's dtype."""
        value.dtype = value.dtype or self.dtype
        value.shape = ir.Shape(shape)
        self._builder.add_output(value, name)

    def model(self) -> ir.Model:
        return ir.Model(
            self._builder.graph,
            ir_version=_IR_VERSION,
            producer_name="nvlm-trt",
            functions=list(self._builder.functions.values()),
        )

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of nodes and values, so that profiles show the layer and names in branches are unique."""
        self._builder.push_module(name)
        try:
            yield
        finally:
            self._builder.pop_module()

    def call(self, function: ir.Function, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Add one node that calls a model-local function."""
        self._builder.root.graph.opset_imports.setdefault(function.domain, 1)
        return self._builder.call(function, *inputs, **attributes)

    def when(self, condition: ir.Value, then: Callable[[StageGraph], ir.Value], otherwise: ir.Value) -> ir.Value:
        """Add an If that runs the nodes that `then` builds if `condition` holds, and returns `otherwise` if not."""

        def trace(op: Any) -> ir.Value:
            branch = copy.copy(self)
            branch._builder = op.builder
            branch.in_branch = True
            return then(branch)

        then_branch = self._builder.subgraph(trace, [], [ir.Value()], name="then")
        else_branch = self._builder.subgraph(lambda op: op.Identity(otherwise), [], [ir.Value()], name="else")
        return self.op.If(condition, then_branch=then_branch, else_branch=else_branch)

    # --- weights -----------------------------------------------------------------------------------------------------

    def stored(
        self,
        name: str,
        shape: Sequence[int],
        blocks: Blocks,
        dtype: ir.DataType | None = None,
        transposed: bool = False,
        parts: Sequence[tuple[str, int]] = (),
    ) -> ir.Value:
        """Add an initializer that is made of `blocks` when the model is saved: a StreamedTensor of these arguments.

        `dtype`: None for the graph's dtype."""
        tensor = StreamedTensor(name, dtype or self.dtype, shape, blocks, transposed, parts)
        return self._builder.initializer(tensor, name, qualify=False)

    def constant(self, name: str, value: npt.NDArray[Any]) -> ir.Value:
        return self._builder.initializer(ir.Tensor(value, name=name), name, qualify=False)

    def float_constant(self, name: str, value: npt.ArrayLike) -> ir.Value:
        """Add a constant in the graph's dtype. Raises EngineError for a number beyond that dtype."""
        array = np.asarray(value)
        stored = narrowed(array, self.dtype.numpy(), lambda element: (name, place_of(element, array.shape)))
        return self.constant(name, stored)

    def weight(self, name: str) -> ir.Value:
        """Add a tensor of the checkpoint as an initializer."""
        tensor = self._weights.take(name)
        return self.stored(name, tensor.shape, lambda first: blocks_of(tensor, first=first))

    def linear(self, x: ir.Value, name: str, parts: Sequence[str] = (), bias: bool = False) -> ir.Value:
        """Apply torch.nn.Linear: [..., inputs] -> [..., outputs]. `parts`: layers that share x, as one product."""
        names = parts or [name]
        stored = tuple(f"{part}.weight" for part in names)
        weight = LinearWeight(f"{name}.weight", tuple(map(self._weights.take, stored)), stored)
        y = self._format.matmul(self, x, weight)
        if not bias:
            return y
        biases = [self._weights.take(f"{part}.bias") for part in names]
        rows = [(f"{part}.bias", bias_.shape[0]) for part, bias_ in zip(names, biases, strict=True)]
        added = self.stored(f"{name}.bias", weight.shape[:1], lambda first: blocks_of(*biases, first=first), parts=rows)
        return self.op.Add(y, added)

    def embedding(self, name: str) -> Embedding:
        weight = LinearWeight(name, (self._weights.take(name),))
        return Embedding(self.stored(name, weight.shape, weight.blocks), weight)

    def tied_linear(self, x: ir.Value, embedding: Embedding) -> ir.Value:
        """Multiply x [B, hidden] by the transposed table: [B, vocab]."""
        return self._format.tied_matmul(self, x, embedding)

    # --- layers ------------------------------------------------------------------------------------------------------

    def rms_norm(self, x: ir.Value, name: str, epsilon: float) -> ir.Value:
        return self.op.RMSNormalization(x, self.weight(f"{name}.weight"), axis=-1, epsilon=epsilon)

    def layer_norm(self, x: ir.Value, name: str, epsilon: float) -> ir.Value:
        scale, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.op.LayerNormalization(x, scale, bias, axis=-1, epsilon=epsilon)

    def swiglu(self, x: ir.Value, name: str) -> ir.Value:
        """Compute down(silu(gate(x)) * up(x))."""
        op = self.op
        gate = self.linear(x, f"{name}.gate_proj")
        up = self.linear(x, f"{name}.up_proj")
        return self.linear(op.Mul(op.Mul(gate, op.Sigmoid(gate)), up), f"{name}.down_proj")

    def split_heads(self, x: ir.Value, heads: int, head_dim: int) -> ir.Value:
        """Turn [B, S, heads * head_dim] into [B, heads, S, head_dim]."""
        return self.op.Transpose(self.op.Reshape(x, [0, 0, heads, head_dim]), perm=[0, 2, 1, 3])

    def merge_heads(self, x: ir.Value, width: int) -> ir.Value:
        """Turn [B, heads, S, head_dim] into [B, S, width], width = heads * head_dim."""
        return self.op.Reshape(self.op.Transpose(x, perm=[0, 2, 1, 3]), [0, 0, width])
