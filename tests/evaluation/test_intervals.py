"""Tests confidence intervals against their definition and against values printed in the literature."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvlm_trt.evaluation.intervals import mean_interval, wilson_interval


# Newcombe, Two-sided confidence intervals for the single proportion, Stat. Med. 17 (1998), table I, method 3
@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_of_newcombe_1998(successes: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(successes / count, count) == pytest.approx((low, high), abs=5e-5)


@given(st.floats(0, 1), st.integers(1, 10**6))
def test_wilson_bounds_are_where_the_score_test_rejects(mean: float, count: int) -> None:
    """The definition: p is in the interval if |mean - p| <= 1.96 standard errors at p."""
    low, high = wilson_interval(mean, count)
    assert 0 <= low <= mean <= high <= 1
    for bound in (low, high):
        assert abs(mean - bound) == pytest.approx(1.959963985 * math.sqrt(bound * (1 - bound) / count), abs=1e-6)


intervals = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 500)), min_size=1, max_size=6)


@given(intervals)
def test_the_interval_of_a_mean_holds_the_mean_and_stays_within_bounds(parts: list[tuple[float, int]]) -> None:
    scored = [(mean, wilson_interval(mean, count)) for mean, count in parts]
    low, high = mean_interval(scored)
    mean = sum(mean for mean, _ in parts) / len(parts)
    assert -1e-12 <= low <= mean + 1e-12
    assert mean - 1e-12 <= high <= 1 + 1e-12
    # never wider than if all parts were at their bounds at once
    assert low >= sum(interval[0] for _, interval in scored) / len(parts) - 1e-12


def test_the_mean_of_one_part_has_its_interval_and_of_four_half_the_width() -> None:
    part = (0.5, wilson_interval(0.5, 100))
    assert mean_interval([part]) == pytest.approx(part[1])
    low, high = mean_interval([part] * 4)
    assert high - low == pytest.approx((part[1][1] - part[1][0]) / 2)
