"""Maps gray values of more than 8 bits to black .. white."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

_BLOCK_VALUES = 1 << 20  # converted to float64 at a time


def gray_to_rgb(
    values: npt.NDArray[Any], white: float | None, *, inverted: bool = False, transparent: int | None = None
) -> Image.Image:
    """Gray values [height, width] of any type -> RGB. Pillow's own convert clips at 255: 16-bit scans become white.

    If all values are within 0 .. `white`, they become black .. white. Otherwise, or for `white` None, they have no
    agreed white: the image's own smallest .. largest finite value become black .. white, however large they are, and an
    image of one value is black. `inverted` swaps black and white. NaN and infinite values are no data, and black.
    The value `transparent` becomes white.
    """
    low, high = _finite_range(values)
    if white is not None and low >= 0 and high <= white:
        low, high = 0.0, white
    scale = 255.0 / ((high - low) or 1.0)
    gray = np.empty(values.shape, np.uint8)
    for rows in _row_blocks(values):
        block = values[rows].astype(np.float64)
        no_data = ~np.isfinite(block)
        block -= low
        block *= scale
        block[no_data] = 0
        if inverted:
            np.subtract(255.0, block, out=block, where=~no_data)
        gray[rows] = np.rint(block, out=block)
        if transparent is not None:
            gray[rows][values[rows] == transparent] = 255
    return Image.fromarray(gray).convert("RGB")


def _finite_range(values: npt.NDArray[Any]) -> tuple[float, float]:
    """Returns the smallest and the largest finite value; zeros if there is none."""
    low, high = float("inf"), float("-inf")
    for rows in _row_blocks(values):
        block = values[rows]
        finite = block[np.isfinite(block)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    return (low, high) if low <= high else (0.0, 0.0)


def _row_blocks(values: npt.NDArray[Any]) -> Iterator[slice]:
    height, width = values.shape
    step = max(1, _BLOCK_VALUES // width)
    for start in range(0, height, step):
        yield slice(start, start + step)
