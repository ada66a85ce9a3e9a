"""Confidence intervals of mean scores: how far other samples of the same kind may move them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

_Z = NormalDist().inv_cdf(0.975)  # 1.96: 95 %, two-sided


def wilson_interval(mean: float, count: int) -> tuple[float, float]:
    """Returns the 95 % interval of a proportion (Wilson 1927; Newcombe 1998's method 3, without continuity correction).

    For scores between 0 and 1 (anls), the interval is wider than necessary, never narrower: their variance is at most
    mean * (1 - mean), the variance of scores that are 0 or 1 and have the same mean.
    """
    assert count > 0, "no samples, no interval"
    square = _Z * _Z
    center = (mean + square / (2 * count)) / (1 + square / count)
    half = _Z / (1 + square / count) * math.sqrt(mean * (1 - mean) / count + square / (4 * count * count))
    # rounding must not push the mean out of its own interval
    return max(0.0, min(mean, center - half)), min(1.0, max(mean, center + half))


def mean_interval(parts: Sequence[tuple[float, tuple[float, float]]]) -> tuple[float, float]:
    """Returns the 95 % interval of the mean of independent means, each given as (mean, interval).

    Adds the squares of the distances on each side, as independent errors add. The interval stays within 0..1. Newcombe
    1998 and MOVER (Zou and Donner 2008) combine Wilson intervals in this way.
    """
    assert parts, "no parts, no interval"
    mean = math.fsum(part for part, _ in parts) / len(parts)
    below = math.sqrt(math.fsum((part - low) ** 2 for part, (low, _) in parts)) / len(parts)
    above = math.sqrt(math.fsum((high - part) ** 2 for part, (_, high) in parts)) / len(parts)
    return mean - below, mean + above
