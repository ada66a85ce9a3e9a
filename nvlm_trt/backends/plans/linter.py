"""Refuses ONNX graphs that TensorRT's parser would misread, or whose plans this backend could not run.

The parser builds the parts of a graph that it knows and silently drops the rest: it never reads nonpad_kv_seqlen. It
aligns is_causal to the upper left corner, and inlines a plugin's node wherever it does not look for plugins
(onnx-tensorrt 10.14 to 11.1). A plan whose shapes depend on values cannot be recorded as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from nvlm_trt.backends.plans.value_shapes import Functions, value_shapes
from nvlm_trt.builders.graphs.tensorrt_functions import ATTENTION, CACHE_UPDATE
from nvlm_trt.errors import EngineError
from nvlm_trt.plugins.gated_cross_attention.onnx_function import NAME, PLUGIN_ATTRIBUTES

_BUILT_IN = (ATTENTION, CACHE_UPDATE)  # the parser knows these operators and ignores the bodies of their functions
_PLUGINS = (NAME,)
_FORBIDDEN_NAMESPACES = ("", "trt", "tensorrt", "std")  # tensorrt.plugin refuses these
_STANDARD_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class Finding:
    """The problem of one node, and what to write instead."""

    node: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.node}: {self.problem}; {self.remedy}"


def check_graph(path: Path, plugins: bool = True) -> None:
    """Raise EngineError with the first finding in the ONNX file `path`. Does not read the weights."""
    findings = lint(onnx.load(path, load_external_data=False), path.parent, plugins)
    if findings:
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise EngineError(f"{path.name} is not what TensorRT would build: {findings[0]}{more}")


def lint(model: ModelProto, directory: Path | str = "", plugins: bool = True) -> list[Finding]:
    """Return every finding, also in branches and in functions that TensorRT inlines: of each node by itself, then of
    the shapes that depend on values.

    `directory` holds the model's external data, from which zero points are read. `plugins`: whether TensorRT has the
    plugins; if not, it inlines their functions."""
    opaque = (*_BUILT_IN, *_PLUGINS) if plugins else _BUILT_IN
    functions = {(f.domain, f.name): f for f in model.functions if f.name not in opaque}
    inferred = onnx.shape_inference.infer_shapes(model)
    of_nodes = _Scope(inferred.graph, _Walk(functions, str(directory), plugins)).findings()
    return [*of_nodes, *(Finding(*problem) for problem in value_shapes(model.graph, functions))]


@dataclass(frozen=True)
class _Walk:
    """What all scopes of one model share."""

    functions: Functions
    directory: str
    plugins: bool


class _Scope:
    """The nodes of one graph, branch or function body, and the values that its names stand for."""

    def __init__(self, body: GraphProto | FunctionProto, walk: _Walk, outer: _Scope | None = None) -> None:
        self.body, self.walk, self.outer = body, walk, outer
        is_graph = isinstance(body, GraphProto)
        self.initializers = {tensor.name: tensor for tensor in body.initializer} if is_graph else {}
        self.values = {v.name: v for v in (*body.input, *body.value_info, *body.output)} if is_graph else {}
        self.inputs = set(self.values) & {v.name for v in body.input} if is_graph else set()
        self.outputs = {v.name for v in body.output} if is_graph else set()
        self.producers = {output: node for node in body.node for output in node.output}

    def findings(self) -> Iterator[Finding]:
        for node in self.body.node:
            yield from self.check(node)
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    if graph.node:
                        yield from _Scope(graph, self.walk, self).findings()
            function = self.walk.functions.get((node.domain, node.op_type))
            if function:
                yield from _Scope(function, self.walk, self).findings()

    def check(self, node: NodeProto) -> Iterator[Finding]:
        where = node.name or f"the node of {node.output[0]}"
        attributes = {
            attribute.name: onnx.helper.get_attribute_value(attribute)
            for attribute in node.attribute
            if attribute.type != AttributeProto.GRAPH
        }
        inputs = [*node.input, *[""] * 8]
        if node.domain == "com.microsoft":
            problem, remedy = f"{node.op_type} is ONNX Runtime's own operator", "build the graph in its TensorRT form"
            yield Finding(where, problem, remedy)
        for problem, remedy in self.problems(node, attributes, inputs):
            yield Finding(where, problem, remedy)

    def problems(
        self, node: NodeProto, attributes: Mapping[str, object], inputs: Sequence[str]
    ) -> Iterator[tuple[str, str]]:
        """Yield (problem, remedy) of one node."""
        kind = node.op_type
        if kind in _PLUGINS or "plugin_namespace" in attributes:
            yield from self._plugin(node, attributes)
        elif kind == ATTENTION:
            yield from self._trt_attention(attributes, inputs)
        elif kind == CACHE_UPDATE or (kind == "TensorScatter" and node.domain in _STANDARD_DOMAINS):
            yield from self._cache_update(node, attributes)
        if node.domain not in _STANDARD_DOMAINS:
            return
        if kind == "Attention":
            yield from self._attention(node, attributes, inputs)
        elif kind == "DynamicQuantizeLinear":
            yield "DynamicQuantizeLinear is not built", "use QuantizeLinear with a calibrated scale"
        elif kind in ("QuantizeLinear", "DequantizeLinear"):
            yield from self._quantization(inputs)
        elif kind in ("MatMul", "Gemm"):
            for name in inputs[:2]:
                yield from self._operand(name)

    # --- one rule each -----------------------------------------------------------------------------------------------

    def _plugin(self, node: NodeProto, attributes: Mapping[str, object]) -> Iterator[tuple[str, str]]:
        kind = node.op_type
        if not self.walk.plugins:
            if (node.domain, kind) not in self.walk.functions:
                yield f"plugin {kind} is not available and has no function", "build the graph in a form without plugins"
            return
        if self.outer is not None:
            yield f"plugin {kind} in a branch or function is inlined, not taken", "put the node into the main graph"
        for name in ("plugin_namespace", "plugin_version"):
            value = attributes.get(name)
            text = value.decode() if isinstance(value, bytes) else ""
            if not text or (name == "plugin_namespace" and text in _FORBIDDEN_NAMESPACES):
                yield (
                    f"plugin {kind} has {name} {text!r}, so its function is inlined instead",
                    f"give it {PLUGIN_ATTRIBUTES}",
                )

    def _trt_attention(self, attributes: Mapping[str, object], inputs: Sequence[str]) -> Iterator[tuple[str, str]]:
        causal = attributes.get("causal_kind", b"none") != b"none"
        if causal and inputs[3]:
            yield "a mask and causal_kind exclude each other", "drop the mask, or set causal_kind to none"
        if attributes.get("causal_kind") == b"upper_left":
            yield "upper_left ignores cached tokens", 'use causal_kind="lower_right"'
        if causal and not inputs[5]:
            yield "without kv_lengths the unused rest of the cache is attended to", "pass kv_lengths as input 5"
        if inputs[5] and self.type_of(inputs[5]) not in (None, TensorProto.INT32):
            yield "kv_lengths is not INT32", "cast it"

    def _cache_update(self, node: NodeProto, attributes: Mapping[str, object]) -> Iterator[tuple[str, str]]:
        shape = self.shape_of(node.input[0])
        axis = attributes.get("axis", -2)
        if axis not in (-2, 2) or (shape is not None and len(shape) != 4):
            yield (
                f"axis {axis} of a cache of {len(shape or ())} dimensions is not updated",
                "use [B, H, N, D] and axis -2",
            )
        if attributes.get("mode", b"linear") != b"linear":
            yield "only the linear mode is built", 'use mode="linear"'
        if node.input[0] not in self.inputs or node.output[0] not in self.outputs:
            yield (
                "a cache that is not both input and output of the graph is not updated in place",
                "make past_cache an input and the result an output",
            )
        elif shape is not None and len(shape) == 4 and not isinstance(shape[2], int):
            yield "the cache's length is not fixed", "fix dimension 2 to max_seq_len"

    def _attention(
        self, node: NodeProto, attributes: Mapping[str, object], inputs: Sequence[str]
    ) -> Iterator[tuple[str, str]]:
        if inputs[6]:
            yield "nonpad_kv_seqlen is ignored", f"use {ATTENTION} with kv_lengths"
        if inputs[4] or inputs[5]:
            yield "past_key and past_value are not built", f"use {CACHE_UPDATE}"
        if len([output for output in node.output if output]) > 1:
            yield "Attention has one output only", f"use {CACHE_UPDATE} for the caches"
        for name in ("softcap", "softmax_precision"):
            if attributes.get(name):
                yield f"{name} is not built", "leave it out"
        if attributes.get("is_causal"):
            if inputs[3]:
                yield "a mask and is_causal exclude each other", "fold the causal mask into the mask"
            shapes = [self.shape_of(name) for name in inputs[:2]]
            lengths = [shape[-2] if shape else None for shape in shapes]
            if lengths[0] is None or lengths[0] != lengths[1]:
                yield (
                    "is_causal is aligned to the upper left, wrong where there are more keys than queries",
                    f'use {ATTENTION} with causal_kind="lower_right"',
                )

    def _quantization(self, inputs: Sequence[str]) -> Iterator[tuple[str, str]]:
        if not inputs[2]:
            return
        zero = self.constant_of(inputs[2])
        if zero is None:
            yield f"zero point {inputs[2]} is not a constant", "store zeros"
        elif zero.dtype.name not in ("int8", "float8_e4m3fn"):
            yield f"quantised to {zero.dtype.name}", "use int8 or float8e4m3fn"
        elif np.any(zero.astype(np.float32)):
            yield "the zero point is not zero: asymmetric quantisation is not built", "quantise symmetrically"

    def _operand(self, name: str) -> Iterator[tuple[str, str]]:
        """Check an input of a MatMul: DequantizeLinear has to be directly in front."""
        producer = self.producers.get(name)
        factors = producer.input if producer is not None and producer.op_type == "Mul" else [name]
        for factor in factors:
            cast = self.producers.get(factor)
            if cast is None or cast.op_type != "Cast":
                continue
            before = self.producers.get(cast.input[0])
            if before is not None and before.op_type == "DequantizeLinear":
                yield "Cast between DequantizeLinear and MatMul prevents their fusion", "give the scale MatMul's type"
            elif self.type_of(cast.input[0]) in (TensorProto.INT8, TensorProto.FLOAT8E4M3FN):
                yield "a quantised weight behind Cast is multiplied in floating point", "use DequantizeLinear"

    # --- types, shapes and constants by name -------------------------------------------------------------------------

    def type_of(self, name: str) -> int | None:
        if name in self.initializers:
            return self.initializers[name].data_type
        if name in self.values:
            return self.values[name].type.tensor_type.elem_type or None
        return self.outer.type_of(name) if self.outer else None

    def shape_of(self, name: str) -> list[int | str] | None:
        if name in self.initializers:
            return list(self.initializers[name].dims)
        if name in self.values and self.values[name].type.tensor_type.HasField("shape"):
            dimensions = self.values[name].type.tensor_type.shape.dim
            return [d.dim_value if d.HasField("dim_value") else d.dim_param for d in dimensions]
        return self.outer.shape_of(name) if self.outer else None

    def constant_of(self, name: str) -> np.ndarray | None:
        tensor = self.initializers.get(name)
        producer = self.producers.get(name)
        if tensor is None and producer is not None and producer.op_type == "Constant":
            tensor = next((attribute.t for attribute in producer.attribute if attribute.name == "value"), None)
        if tensor is None:
            return self.outer.constant_of(name) if self.outer else None
        return numpy_helper.to_array(tensor, self.walk.directory)
