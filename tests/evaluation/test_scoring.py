"""Metrics against slow definitions and against values printed in the literature."""

from __future__ import annotations

import functools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvlm_trt.evaluation.scoring import anls, levenshtein, mean_interval, number_in, score, wilson_interval

# few letters, so that strings have something in common
words = st.text(alphabet="abC ", max_size=9)


def slow_levenshtein(a: str, b: str) -> int:
    """The recursive definition."""

    @functools.cache
    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        if a[i - 1] == b[j - 1]:
            return distance(i - 1, j - 1)
        return 1 + min(distance(i - 1, j), distance(i, j - 1), distance(i - 1, j - 1))

    return distance(len(a), len(b))


@given(words, words)
def test_levenshtein_is_its_recursive_definition(a: str, b: str) -> None:
    assert levenshtein(a, b) == slow_levenshtein(a, b)


@given(words, words, words)
def test_levenshtein_is_a_metric(a: str, b: str, c: str) -> None:
    assert (levenshtein(a, b) == 0) == (a == b)
    assert levenshtein(a, b) == levenshtein(b, a)
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)


@pytest.mark.parametrize(("a", "b", "expected"), [("kitten", "sitting", 3), ("saturday", "sunday", 3), ("", "abc", 3)])
def test_levenshtein_of_textbook_pairs(a: str, b: str, expected: int) -> None:
    assert levenshtein(a, b) == expected


@given(words, words)
def test_anls_is_the_definition_of_biten_et_al(a: str, b: str) -> None:
    plain_a, plain_b = (" ".join(text.lower().split()) for text in (a, b))
    longest = max(len(plain_a), len(plain_b))
    normalized = slow_levenshtein(plain_a, plain_b) / longest if longest else 0.0
    assert score("anls", a, b) == (1 - normalized if normalized < 0.5 else 0.0)


def test_anls_at_its_threshold() -> None:
    assert anls("abcd", "abxy") == 0.0  # NL = 0.5 is too far
    assert anls("abcde", "abcxy") == pytest.approx(0.6)
    assert anls("  The\nTotal ", "the total") == 1.0


@pytest.mark.parametrize(
    ("given_text", "known", "expected"),
    [("12.50", "12.50", 1), (" 12.50\n", "12.50", 1), ("12.5", "12.50", 0), ("Red", "red", 0), ("", "red", 0)],
)
def test_exact(given_text: str, known: str, expected: int) -> None:
    assert score("exact", given_text, known) == expected


@pytest.mark.parametrize(
    ("given_text", "known", "expected"),
    [
        ("The total is 12.50.", "12.50", 1),
        ("A  RED\ncircle", "red circle", 1),
        ("12", "2", 1),
        ("re d", "red", 0),
        ("", "red", 0),
    ],
)
def test_contains(given_text: str, known: str, expected: int) -> None:
    assert score("contains", given_text, known) == expected


@pytest.mark.parametrize(
    ("given_text", "known", "tolerance", "expected"),
    [
        ("12.5", "12.50", 0, 1),
        ("$1,234.50", "1234.5", 0, 1),
        ("-$3", "-3", 0, 1),
        ("45 %", "45", 0, 1),
        ("12.51", "12.50", 0, 0),
        ("105", "100", 0.05, 1),
        ("95", "100", 0.05, 1),
        ("105.0000001", "100", 0.05, 0),
        ("-95", "-100", 0.05, 1),
        ("0.3", "0.1", 2.0, 1),
        ("13", "10", 0.3, 1),  # 0.3 as a binary fraction is less than 0.3
        ("0", "0", 0, 1),
        ("0.001", "0", 0.5, 0),
        ("1,23", "123", 0, 0),
        ("12 13", "12", 0, 0),
        ("about 12", "12", 0, 0),
        ("1e3", "1000", 0, 0),
        ("nan", "12", 1, 0),
        ("", "12", 1, 0),
        (".", "0", 1, 0),
        ("9" * 5000, "12", 1, 0),
    ],
)
def test_numeric(given_text: str, known: str, tolerance: float, expected: int) -> None:
    assert score("numeric", given_text, known, tolerance) == expected


@given(st.integers(-(10**12), 10**12), st.integers(0, 3))
def test_numbers_are_read_as_they_are_written(value: int, decimals: int) -> None:
    number = number_in(f"{value / 10**decimals:,.{decimals}f}")
    assert number is not None
    assert math.isclose(number, value / 10**decimals, abs_tol=1e-9)


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
