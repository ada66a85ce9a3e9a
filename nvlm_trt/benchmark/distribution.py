"""Summarizes a list of values: mean, percentiles, maximum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Distribution:
    """Holds mean, percentiles and maximum of `count` values, in the unit of the values.

    A percentile p is the sorted value at position (count - 1) * p / 100, counted from 0, interpolated linearly between
    two values (numpy's default). The p99 of fewer than 100 values therefore lies between the two largest.
    """

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution | None:
        """Summarizes `values`. Returns None if there are none."""
        if not values:
            return None
        p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
        return cls(len(values), math.fsum(values) / len(values), p50, p90, p99, max(values))
