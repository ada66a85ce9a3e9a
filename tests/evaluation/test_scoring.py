"""Tests metrics against slow definitions and against values printed in the literature."""

from __future__ import annotations

import functools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from nvlm_trt.evaluation.scoring import anls, number_in, score

# few letters, so that strings have something in common
words = st.text(alphabet="abC ", max_size=9)
levenshtein = Levenshtein.distance


def slow_levenshtein(a: str, b: str) -> int:
    """Computes the distance by its recursive definition."""

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


def table_levenshtein(a: str, b: str) -> int:
    """Computes the distance by a table of prefixes, for strings too long for the recursive definition."""
    above = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        row = [i]
        for j, right in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (left != right)))
        above = row
    return above[-1]


# lengths around 64 characters, a word of rapidfuzz's bit vectors, and characters of one, two and four bytes
@given(
    st.text(alphabet="aé€🐟 ", min_size=50, max_size=150), st.text(alphabet="aé€🐟", max_size=150), st.integers(0, 150)
)
def test_anls_of_long_answers_is_exactly_the_definition(a: str, tail: str, kept: int) -> None:
    b = a[:kept] + tail
    plain_a, plain_b = (" ".join(text.lower().split()) for text in (a, b))
    longest = max(len(plain_a), len(plain_b))
    normalized = table_levenshtein(plain_a, plain_b) / longest if longest else 0.0
    assert score("anls", a, b) == (1.0 - normalized if normalized < 0.5 else 0.0)


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
