"""Finds elements that are not finite, by their bits: cheaper than NumPy's isfinite, which float16 makes slow."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# the bits of positive infinity; those of every NaN are greater, sign aside
# F8_E4M3 has no infinity: this is its NaN
_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F8_E4M3": 0x7F}
_FINITE = -1


def first_not_finite(bits: npt.NDArray[Any], dtype: str) -> int:
    """Return the index of the first element that is not finite, -1 if there is none.

    `bits` [n] are the elements of `dtype` (BF16, F16, F32, F8_E4M3) as unsigned integers."""
    infinity = _INFINITY[dtype]
    sign = 1 << (8 * bits.itemsize - 1)
    positive = bits.view(f"i{bits.itemsize}").max(initial=0)  # negative elements are negative integers
    if positive < infinity and bits.max(initial=0) < infinity | sign:
        return _FINITE
    return int(np.argmax(bits & (sign - 1) >= infinity))
