"""Reads the layers of a TensorRT-RTX network: kinds, tensors and the values of constants.

Importing this module skips the importing tests where TensorRT-RTX's Python bindings are not installed.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

trt: Any = pytest.importorskip(
    "tensorrt_rtx_bindings",
    reason="needs TensorRT-RTX: pip install tensorrt_rtx_cu13_libs tensorrt_rtx_cu13_bindings",
    exc_type=ImportError,
)

Array = np.ndarray[Any, np.dtype[Any]]

NUMPY: dict[str, Any] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "FP8": ml_dtypes.float8_e4m3fn,
    "INT4": ml_dtypes.int4,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}
# The kinds that the product's graphs become, and those of TensorRT-LLM's front end. A network with another kind is
# refused, and `network_interpreter.run` refuses the kinds for which it is given no operator.
LAYERS: dict[str, type] = {
    "ACTIVATION": trt.IActivationLayer,
    "ATTENTION_INPUT": trt.IAttentionInputLayer,
    "ATTENTION_OUTPUT": trt.IAttentionOutputLayer,
    "CAST": trt.ICastLayer,
    "CONCATENATION": trt.IConcatenationLayer,
    "CONDITIONAL_INPUT": trt.IIfConditionalInputLayer,
    "CONDITIONAL_OUTPUT": trt.IIfConditionalOutputLayer,
    "CONSTANT": trt.IConstantLayer,
    "CUMULATIVE": trt.ICumulativeLayer,
    "DEQUANTIZE": trt.IDequantizeLayer,
    "ELEMENTWISE": trt.IElementWiseLayer,
    "FILL": trt.IFillLayer,
    "GATHER": trt.IGatherLayer,
    "IDENTITY": trt.IIdentityLayer,
    "KV_CACHE_UPDATE": trt.IKVCacheUpdateLayer,
    "MATRIX_MULTIPLY": trt.IMatrixMultiplyLayer,
    "NORMALIZATION": trt.INormalizationLayer,
    "QUANTIZE": trt.IQuantizeLayer,
    "REDUCE": trt.IReduceLayer,
    "ROTARY_EMBEDDING": trt.IRotaryEmbeddingLayer,
    "SELECT": trt.ISelectLayer,
    "SHAPE": trt.IShapeLayer,
    "SHUFFLE": trt.IShuffleLayer,
    "SLICE": trt.ISliceLayer,
    "SOFTMAX": trt.ISoftMaxLayer,
    "SQUEEZE": trt.ISqueezeLayer,
    "UNARY": trt.IUnaryLayer,
    "UNSQUEEZE": trt.IUnsqueezeLayer,
}


@dataclass(frozen=True)
class Tensor:
    """An input or output of a layer, as the network declares it."""

    name: str
    kind: str  # a key of NUMPY
    shape: tuple[int, ...]  # -1: known when the network runs
    dimensions: tuple[str | None, ...]  # the names of an input's dimensions

    @staticmethod
    def of(tensor: Any) -> Tensor:
        shape = tuple(tensor.shape)
        names = tuple(tensor.get_dimension_name(i) or None for i in range(len(shape)))
        return Tensor(tensor.name, tensor.dtype.name, shape, names)

    def check(self, value: Array) -> None:
        """Raise AssertionError for a value of another type or shape."""
        assert self.kind in NUMPY, f"{self.name} has the unknown type {self.kind}"
        assert value.dtype == NUMPY[self.kind], f"{self.name} is {self.kind}, not {value.dtype}"
        fits = len(self.shape) == value.ndim and all(
            declared in (-1, size) for declared, size in zip(self.shape, value.shape, strict=True)
        )
        assert fits, f"{self.name} is {self.shape}, not {value.shape}"


@dataclass(frozen=True)
class Layer:
    """One layer. `api` is the bindings' object of the layer's own class, which has the attributes."""

    kind: str  # a key of LAYERS
    name: str
    api: Any
    inputs: tuple[Tensor | None, ...]
    output: Tensor

    @staticmethod
    def of(api: Any) -> Layer:
        """Give a network's bare ILayer the class of its kind. Raise NotImplementedError for an unknown kind."""
        kind = trt.ILayer.type.fget(api).name  # some classes, such as IActivationLayer, hide `type` by one of their own
        if kind not in LAYERS:
            raise NotImplementedError(f"layer {api.name} is of the unknown kind {kind}")
        api.__class__ = LAYERS[kind]
        assert api.num_outputs == 1, f"layer {api.name} has {api.num_outputs} outputs"
        tensors = (api.get_input(i) for i in range(api.num_inputs))
        inputs = tuple(None if tensor is None else Tensor.of(tensor) for tensor in tensors)
        return Layer(kind, api.name, api, inputs, Tensor.of(api.get_output(0)))


class _Weights(ctypes.Structure):
    """nvinfer1::Weights."""

    _fields_ = (("type", ctypes.c_int32), ("values", ctypes.c_void_p), ("count", ctypes.c_int64))


def constant_values(api: Any) -> Array:
    """Return the values of an IConstantLayer. The parser that made the layer must still live."""
    weights = api.weights
    shape = tuple(api.shape)
    if isinstance(weights, np.ndarray):
        return weights.reshape(shape).copy()
    # NumPy has no bf16, fp8 and int4 of its own, so the bindings give the Weights object. Only C++ shows its pointer:
    # pybind11 keeps the address of the C++ object after the header of the Python object.
    address = ctypes.c_void_p.from_address(id(weights) + object.__basicsize__).value
    assert address is not None
    raw = _Weights.from_address(address)
    assert raw.count == weights.size, "the bindings lay the object out in another way"
    assert raw.type == int(weights.dtype), "the bindings lay the object out in another way"
    kind, count = weights.dtype.name, weights.size
    size = (count + 1) // 2 if kind == "INT4" else count * np.dtype(NUMPY[kind]).itemsize  # nbytes is wrong for INT4
    stored = np.frombuffer(ctypes.string_at(raw.values, size), np.uint8)
    return (_signed_nibbles(stored, count) if kind == "INT4" else stored.view(NUMPY[kind])).reshape(shape)


def _signed_nibbles(stored: Array, count: int) -> Array:
    """Unpack two numbers per byte, the first in the low half: uint8 [ceil(count / 2)] -> int4 [count]."""
    nibbles = np.stack([stored & 15, stored >> 4], axis=1).ravel()[:count].astype(np.int8)
    return np.where(nibbles > 7, nibbles - 16, nibbles).astype(ml_dtypes.int4)
