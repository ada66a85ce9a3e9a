"""Converts numbers of a checkpoint to the type that an engine stores, and names the first that a 16-bit type lacks.

fp16 ends at 65504, where bf16 and float32 go on to 3e38: a bf16 checkpoint may hold weights that fp16 cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from nvlm_trt.checkpoint.finite import first_not_finite
from nvlm_trt.errors import EngineError

# type -> our name, its name in safetensors files, the types that hold what it does not
_NARROW = {
    np.dtype(np.float16): ("fp16", "F16", "bf16"),
    np.dtype(ml_dtypes.bfloat16): ("bf16", "BF16", "fp32"),
}


def narrowed(
    values: npt.NDArray[Any], dtype: npt.DTypeLike, locate: Callable[[int], tuple[str, Sequence[int]]]
) -> npt.NDArray[Any]:
    """Converts an array to `dtype`. `locate` returns the tensor and the place of an element, given the element's number
    in `values`.

    Raises EngineError for a number that is infinite or NaN in a 16-bit type."""
    with np.errstate(over="ignore"):  # reported below
        stored = np.asarray(values, dtype)
    if stored.dtype not in _NARROW or stored.dtype == values.dtype:
        return stored
    name, kind, wider = _NARROW[stored.dtype]
    element = first_not_finite(np.ascontiguousarray(stored).view(np.uint16).reshape(-1), kind)
    if element >= 0:
        tensor, place = locate(element)
        raise EngineError(
            f"{tensor} has {float(values.reshape(-1)[element]):g} at {list(place)}, and {name} ends at "
            f"{float(ml_dtypes.finfo(stored.dtype).max):.5g}; choose {wider} with --precision"
        )
    return stored


def place_of(element: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the indices of an element, given its number in an array of `shape`."""
    return tuple(map(int, np.unravel_index(element, tuple(shape))))
