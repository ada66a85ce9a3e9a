"""Runs in NumPy, strictly, the layers of TensorRT-RTX that move, compare and compute numbers.

Nothing is cast, wrapped, clipped or broadcast over ranks unless the layer says so. Sizes of 1 are broadcast, as
TensorRT does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from attention_operators import attention, cache_update, dequantize, quantize, rotary_embedding
from layer_meanings import Meaning
from layer_reading import NUMPY, Array, trt

# (the layer, its inputs, the meaning) -> its output
Operator = Callable[[Any, list[Any], Meaning], Array]

_ELEMENTWISE: dict[str, Callable[[Array, Array], Array]] = {
    "SUM": np.add,
    "PROD": np.multiply,
    "SUB": np.subtract,
    "MAX": np.maximum,
    "MIN": np.minimum,
    "EQUAL": np.equal,
    "GREATER": np.greater,
    "LESS": np.less,
    "AND": np.logical_and,
    "OR": np.logical_or,
    "FLOOR_DIV": np.floor_divide,
}
_UNARY: dict[str, Callable[[Array], Array]] = {
    "SQRT": np.sqrt,
    "RECIP": lambda x: np.reciprocal(x),
    "NOT": np.logical_not,
}
_REDUCE: dict[str, Callable[..., Array]] = {"AVG": np.mean, "MAX": np.max}


def _elementwise(api: Any, inputs: list[Array], meaning: Meaning) -> Array:
    a, b = inputs
    _alike(a, b)
    name = api.op.name
    if name == "DIV":
        return a / b if a.dtype.kind == "f" else meaning.integer_quotient(a, b)
    return _known(_ELEMENTWISE, name)(a, b)


def _unary(api: Any, inputs: list[Array], meaning: Meaning) -> Array:
    return _known(_UNARY, api.op.name)(*inputs)


def _activation(api: Any, inputs: list[Array], meaning: Meaning) -> Array:
    (x,) = inputs
    kind = trt.IActivationLayer.type.fget(api).name
    functions: dict[str, Callable[[Array], Array]] = {
        "SIGMOID": lambda x: (0.5 * (1 + np.tanh(0.5 * x))).astype(x.dtype),  # which does not overflow
        "TANH": np.tanh,
        "GELU_ERF": meaning.gelu_erf,
    }
    return _known(functions, kind)(x)


def _reduce(api: Any, inputs: list[Array], meaning: Meaning) -> Array:
    (x,) = inputs
    axes = _axes(api.axes, x.ndim)
    return np.asarray(_known(_REDUCE, api.op.name)(x, axis=axes, keepdims=api.keep_dims)).astype(x.dtype)


def _normalization(api: Any, inputs: list[Array], meaning: Meaning) -> Array:
    """Apply LayerNormalization: scale and bias have the rank of x."""
    x, scale, bias = inputs
    assert api.num_groups == 1
    assert x.ndim == scale.ndim == bias.ndim
    axes = _axes(api.axes, x.ndim)
    centred = x - x.mean(axes, keepdims=True)
    variance = np.square(centred).mean(axes, keepdims=True)
    return centred / np.sqrt(variance + np.float32(api.epsilon)) * scale + bias


def _cumulative(api: Any, inputs: list[Array], meaning: Meaning) -> Array:
    x, axis = inputs
    assert api.op.name == "SUM"
    assert not api.exclusive
    assert not api.reverse
    return meaning.cumulative_sum(x, int(axis))


def _matrix_multiply(api: Any, inputs: list[Array], meaning: Meaning) -> Array:
    _alike(*inputs)
    a, b = (
        _known({"NONE": x, "TRANSPOSE": x.swapaxes(-1, -2)}, op.name)
        for x, op in zip(inputs, (api.op0, api.op1), strict=True)
    )
    return np.matmul(a, b)


def _cast(api: Any, inputs: list[Array], meaning: Meaning) -> Array:
    (x,) = inputs
    to = np.dtype(NUMPY[api.to_type.name])
    if to.kind == "i":
        assert np.isfinite(x).all()
    return x.astype(to)


def _shape(api: Any, inputs: list[Array], meaning: Meaning) -> Array:
    return np.array(inputs[0].shape, np.int64)


def _fill(api: Any, inputs: list[Array], meaning: Meaning) -> Array:
    """Count from alpha in steps of beta, attributes or inputs of shapes [] and [1]: shape [1] -> [n]."""
    assert api.operation.name == "LINSPACE"
    to = NUMPY[api.to_type.name]
    (size,), *given = inputs
    alpha, (beta,) = given or (np.array(api.alpha), np.array([api.beta]))
    assert alpha.shape == ()
    if given:
        assert alpha.dtype == beta.dtype == to
    else:
        assert api.alpha == int(api.alpha)
        assert api.beta == int(api.beta)
    return alpha.astype(to) + beta.astype(to) * np.arange(size, dtype=to)


def _shuffle(api: Any, inputs: list[Array], meaning: Meaning) -> Array:
    x = inputs[0].transpose(_order(api.first_transpose, inputs[0].ndim))
    declared = api.reshape_dims
    assert len(inputs) == 1 or declared is None
    shape = inputs[1].tolist() if len(inputs) > 1 else None if declared is None else list(declared)
    if shape is not None:
        if api.zero_is_placeholder:
            shape = [x.shape[i] if size == 0 else size for i, size in enumerate(shape)]
        assert shape.count(-1) <= 1
        x = x.reshape(shape)
    return x.transpose(_order(api.second_transpose, x.ndim))


def _squeeze(api: Any, inputs: list[Array], meaning: Meaning) -> Array:
    """Remove the axes that the second input names, or else every axis of size 1; each is of size 1."""
    return np.squeeze(inputs[0], tuple(inputs[1].tolist()) if len(inputs) > 1 else None)


def _unsqueeze(api: Any, inputs: list[Array], meaning: Meaning) -> Array:
    return np.expand_dims(inputs[0], tuple(inputs[1].tolist()))


def _concatenation(api: Any, inputs: list[Array], meaning: Meaning) -> Array:
    for x in inputs:
        _alike(inputs[0], x)
    return np.concatenate(inputs, axis=api.axis)


def _gather(api: Any, inputs: list[Array], meaning: Meaning) -> Array:
    x, indices = inputs
    assert indices.dtype.kind == "i"
    assert indices.min(initial=0) >= 0
    if api.mode.name == "DEFAULT":
        assert api.num_elementwise_dims == 0
        assert indices.max(initial=0) < x.shape[api.axis]
        return np.take(x, indices, axis=api.axis)
    assert api.mode.name == "ND", f"gathering by {api.mode.name} is unknown"
    # x [B, S, ...], indices [B, 1] -> [B, ...]
    assert api.num_elementwise_dims == 1
    assert indices.shape == (len(x), 1)
    assert indices.max(initial=0) < x.shape[1]
    return x[np.arange(len(x)), indices[:, 0]]


def _slice(api: Any, inputs: list[Any], meaning: Meaning) -> Array:
    given: list[Any] = [*inputs, *[None] * (6 - len(inputs))]
    x, start, size, stride, fill, axes = given
    assert api.mode.name == "STRICT_BOUNDS", f"slicing by {api.mode.name} is unknown"
    assert fill is None
    along = range(x.ndim) if api.axes is None and axes is None else _given(api.axes, axes)
    index = [np.arange(length) for length in x.shape]
    for axis, first, count, step in zip(
        along, _given(api.start, start), _given(api.shape, size), _given(api.stride, stride), strict=True
    ):
        places = first + np.arange(count) * step
        assert places.min(initial=0) >= 0, f"a slice starts at {first}"
        assert places.max(initial=0) < max(x.shape[axis], 1), f"a slice of {x.shape} ends outside axis {axis}"
        index[axis] = places
    return x[np.ix_(*index)]


def _select(api: Any, inputs: list[Array], meaning: Meaning) -> Array:
    condition, then, otherwise = inputs
    _alike(then, otherwise)
    assert condition.dtype == np.bool_
    assert condition.ndim == then.ndim
    return np.where(condition, then, otherwise)


def _attention_output(api: Any, inputs: list[Array], meaning: Meaning) -> Array:
    return inputs[0]


OPERATORS: dict[str, Operator] = {
    "ACTIVATION": _activation,
    "ATTENTION_INPUT": attention,
    "ATTENTION_OUTPUT": _attention_output,
    "CAST": _cast,
    "CONCATENATION": _concatenation,
    "CUMULATIVE": _cumulative,
    "DEQUANTIZE": dequantize,
    "ELEMENTWISE": _elementwise,
    "FILL": _fill,
    "GATHER": _gather,
    "KV_CACHE_UPDATE": cache_update,
    "MATRIX_MULTIPLY": _matrix_multiply,
    "NORMALIZATION": _normalization,
    "QUANTIZE": quantize,
    "REDUCE": _reduce,
    "ROTARY_EMBEDDING": rotary_embedding,
    "SELECT": _select,
    "SHAPE": _shape,
    "SHUFFLE": _shuffle,
    "SLICE": _slice,
    "SQUEEZE": _squeeze,
    "UNARY": _unary,
    "UNSQUEEZE": _unsqueeze,
}


def _alike(a: Array, b: Array) -> None:
    assert a.dtype == b.dtype, f"{a.dtype} is not {b.dtype}"
    assert a.ndim == b.ndim, f"{a.shape} and {b.shape} have different ranks"


def _known(table: dict[str, Any], name: str) -> Any:
    if name not in table:
        raise NotImplementedError(f"{name} is unknown")
    return table[name]


def _axes(bits: int, rank: int) -> tuple[int, ...]:
    assert bits >> rank == 0
    return tuple(axis for axis in range(rank) if bits >> axis & 1)


def _order(permutation: Sequence[int], rank: int) -> list[int]:
    """Return the first `rank` places of a permutation, which TensorRT holds for its largest rank."""
    order = list(permutation)[:rank]
    assert sorted(order) == list(range(rank))
    return order


def _given(declared: Any, tensor: Array | None) -> list[int]:
    """Return numbers that a layer has either as an attribute or as an input."""
    assert (declared is None) != (tensor is None)
    return list(declared) if tensor is None else tensor.tolist()
