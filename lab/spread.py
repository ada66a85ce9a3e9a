"""Sums up a metric or a ratio over the rounds: its median and its extremes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Holds the median, the lowest and the highest of some values."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{short(self.median)} ({short(self.lowest)} to {short(self.highest)})"


def short(value: float) -> str:
    """Writes three digits, and every digit before the decimal point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
