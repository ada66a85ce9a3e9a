"""Runs a parsed TensorRT-RTX network on the CPU, strictly: what the parser understood, without a GPU.

Every input and output is checked against the type and shape that the network declares for it. In half precision a
layer computes in float32 and rounds once, as TensorRT's kernels may.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
from layer_meanings import HONEST, Meaning
from layer_reading import Array, Layer, Tensor
from network_operators import OPERATORS, Operator
from parsed_network import ParsedNetwork

_HALF = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
_ROUNDED_ONCE = {
    "ACTIVATION",
    "CUMULATIVE",
    "ELEMENTWISE",
    "MATRIX_MULTIPLY",
    "NORMALIZATION",
    "REDUCE",
    "ROTARY_EMBEDDING",
    "SOFTMAX",
    "UNARY",
}


class LayerError(Exception):
    """A layer that cannot run as it stands: an index out of bounds, another type or shape, an unknown mode."""


def run(
    parsed: ParsedNetwork,
    feeds: Mapping[str, Array],
    meaning: Meaning = HONEST,
    adopt: Callable[[str, Array], Array] = lambda name, value: value,
    operators: Mapping[str, Operator] = OPERATORS,
) -> dict[str, Array]:
    """Run every layer. Return name -> value of the network's outputs.

    `adopt` gets the name and value of each layer's output, and returns the value that the layers after it read."""
    assert feeds.keys() == {tensor.name for tensor in parsed.inputs}
    sizes: dict[str, int] = {}
    values = dict(parsed.constants)
    for tensor in parsed.inputs:
        tensor.check(feeds[tensor.name])
        _check_dimensions(tensor, feeds[tensor.name], sizes)
        values[tensor.name] = feeds[tensor.name]
    for layer in parsed.layers:
        if layer.kind == "CONSTANT":
            layer.output.check(values[layer.output.name])
            continue
        try:
            value = _output(
                operators[layer.kind],
                layer,
                [None if tensor is None else values[tensor.name] for tensor in layer.inputs],
                meaning,
            )
            layer.output.check(value)
        except Exception as error:
            raise LayerError(f"{layer.kind} {layer.name}: {error!r}") from error
        values[layer.output.name] = adopt(layer.output.name, value)
    for tensor in parsed.outputs:
        _check_dimensions(tensor, values[tensor.name], sizes)
    return {tensor.name: values[tensor.name] for tensor in parsed.outputs}


def _output(operator: Operator, layer: Layer, inputs: list[Array | None], meaning: Meaning) -> Array:
    types = {x.dtype for x in inputs if x is not None and x.dtype in _HALF}
    if layer.kind not in _ROUNDED_ONCE or not types:
        return np.asarray(operator(layer.api, inputs, meaning))
    (rounded,) = types
    floats = {x.dtype for x in inputs if x is not None and x.dtype.kind == "f" and x.dtype not in _HALF}
    assert not floats, f"{rounded} beside {floats}"
    widened = [x.astype(np.float32) if x is not None and x.dtype in _HALF else x for x in inputs]
    exact = operator(layer.api, widened, meaning)
    return np.asarray(exact).astype(rounded) if exact.dtype == np.float32 else np.asarray(exact)


def _check_dimensions(tensor: Tensor, value: Array, sizes: dict[str, int]) -> None:
    """Assert that a named dimension, such as "batch", has one size everywhere."""
    for name, size in zip(tensor.dimensions, value.shape, strict=True):
        if name is not None:
            assert sizes.setdefault(name, size) == size, f"{name} of {tensor.name} is {size}, not {sizes[name]}"
