"""Runs networks of TensorRT-LLM's front end: they have conditionals, and layers that our own graphs have not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from layer_meanings import HONEST, Meaning
from layer_reading import Array, Layer, Tensor, trt
from network_interpreter import run
from network_operators import OPERATORS, Operator
from parsed_network import ParsedNetwork


class ConditionalNetwork(ParsedNetwork):
    """A network with conditionals. The condition is the last input of each of its conditional's outputs."""

    @cached_property
    def layers(self) -> list[Layer]:
        conditions: dict[str, Tensor] = {}
        layers: list[Layer] = []
        for i in range(self.network.num_layers):
            api = self.network.get_layer(i)
            if trt.ILayer.type.fget(api).name == "CONDITION":  # it has no output of its own
                api.__class__ = trt.IConditionLayer
                conditions[api.conditional.name] = Tensor.of(api.get_input(0))
            else:
                layers.append(Layer.of(api))
        return self._ordered([self._with_condition(layer, conditions) for layer in layers])

    def _with_condition(self, layer: Layer, conditions: Mapping[str, Tensor]) -> Layer:
        if layer.kind != "CONDITIONAL_OUTPUT":
            return layer
        return replace(layer, inputs=(*layer.inputs, conditions[layer.api.conditional.name]))


def run_network(
    network: ConditionalNetwork, feeds: Mapping[str, Array], adopt: Callable[[str, Array], Array]
) -> dict[str, Array]:
    """Run a network as `network_interpreter.run` does, both branches of every conditional."""
    with np.errstate(invalid="ignore"):  # a row that reads no key is NaN until the network drops it
        return run(network, feeds, HONEST, adopt, _OPERATORS)


def _elementwise(api: Any, inputs: list[Array], meaning: Meaning) -> Array:
    if api.op.name != "POW":
        return OPERATORS["ELEMENTWISE"](api, inputs, meaning)
    base, exponent = inputs
    assert base.dtype == exponent.dtype
    assert base.ndim == exponent.ndim
    return np.power(base, exponent)


def _reduce(api: Any, inputs: list[Array], meaning: Meaning) -> Array:
    if api.op.name != "SUM":
        return OPERATORS["REDUCE"](api, inputs, meaning)
    (x,) = inputs
    return np.asarray(x.sum(_axes(api.axes, x.ndim), dtype=x.dtype, keepdims=api.keep_dims))


def _softmax(api: Any, inputs: list[Array], meaning: Meaning) -> Array:
    """A row of -inf becomes NaN."""
    (x,) = inputs
    axes = _axes(api.axes, x.ndim)
    weights = np.exp(x - x.max(axes, keepdims=True))
    return weights / weights.sum(axes, keepdims=True)


def _gather(api: Any, inputs: list[Array], meaning: Meaning) -> Array:
    if api.mode.name != "ELEMENT":
        return OPERATORS["GATHER"](api, inputs, meaning)
    x, indices = inputs
    assert indices.dtype.kind == "i"
    assert indices.ndim == x.ndim
    assert indices.min(initial=0) >= 0
    assert indices.max(initial=0) < x.shape[api.axis]
    return np.take_along_axis(x, indices, axis=api.axis)


def _with_one_scale(kind: str) -> Operator:
    """A scale of shape [1] is one for the whole tensor."""

    def operate(api: Any, inputs: list[Array], meaning: Meaning) -> Array:
        x, scale, *zeros = inputs
        return OPERATORS[kind](api, [x, scale.reshape(()) if scale.shape == (1,) else scale, *zeros], meaning)

    return operate


def _identity(api: Any, inputs: list[Array], meaning: Meaning) -> Array:
    (x,) = inputs
    return x


def _chosen_branch(api: Any, inputs: list[Array], meaning: Meaning) -> Array:
    then, otherwise, condition = inputs
    assert condition.dtype == np.bool_
    assert condition.shape == ()
    assert then.dtype == otherwise.dtype
    assert then.shape == otherwise.shape
    return then if condition else otherwise


def _axes(bits: int, rank: int) -> tuple[int, ...]:
    assert bits >> rank == 0
    return tuple(axis for axis in range(rank) if bits >> axis & 1)


_OPERATORS: dict[str, Operator] = {
    **OPERATORS,
    "CONDITIONAL_INPUT": _identity,
    "CONDITIONAL_OUTPUT": _chosen_branch,
    "DEQUANTIZE": _with_one_scale("DEQUANTIZE"),
    "ELEMENTWISE": _elementwise,
    "GATHER": _gather,
    "IDENTITY": _identity,
    "QUANTIZE": _with_one_scale("QUANTIZE"),
    "REDUCE": _reduce,
    "SOFTMAX": _softmax,
}
