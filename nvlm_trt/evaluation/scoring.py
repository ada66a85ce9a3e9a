"""Scores an answer against the known one by one of four metrics. Every score is in 0..1.

exact     1 if both are the same text, without the white space around them; case counts.
contains  1 if the known answer occurs in the given one; both in lower case, runs of white space as one space.
          OCRBench's rule (Liu et al. 2023, arXiv 2305.07895). The rule finds "2" in "12", too.
anls      Average normalized Levenshtein similarity (Biten et al. 2019, arXiv 1905.13648), as DocVQA uses
          it: s = 1 - NL if NL < 0.5, else 0, where NL = Levenshtein(a, b) / max(|a|, |b|); lower case and runs of
          white space as for `contains`. With the single known answer of a sample there is no maximum to take.
numeric   1 if both are numbers p and a with |p - a| <= tolerance * |a|: ChartQA's relaxed accuracy (Masry et al. 2022,
          arXiv 2203.10244) has tolerance 0.05. The whole answer must be the number; a currency sign before it, a
          percent sign behind it and commas between thousands are ignored. Compared exactly, without rounding.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal

Metric = Literal["exact", "contains", "anls", "numeric"]

ANLS_THRESHOLD = 0.5
_NUMBER = re.compile(r"[$€£¥]? ?([+-]?)[$€£¥]?((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+) ?%?")
_LONGEST_NUMBER = 100  # characters; a longer text is no quantity, and Python refuses to read thousands of digits


def score(metric: Metric, given: str, known: str, tolerance: float = 0.0) -> float:
    """Scores the given answer, 0..1; `tolerance` is relative and for `numeric` only."""
    if metric == "exact":
        return float(given.strip() == known.strip())
    if metric == "contains":
        return float(_plain(known) in _plain(given))
    if metric == "anls":
        return anls(given, known)
    assert metric == "numeric", metric
    given_number, known_number = number_in(given), number_in(known)
    if given_number is None or known_number is None:
        return 0.0
    # through str: the tolerance is the decimal fraction that the user typed, not the nearest binary fraction
    return float(abs(given_number - known_number) <= Fraction(str(tolerance)) * abs(known_number))


def anls(given: str, known: str) -> float:
    """Computes the normalized Levenshtein similarity, 0..1; 0 below ANLS_THRESHOLD."""
    from rapidfuzz.distance import Levenshtein

    a, b = _plain(given), _plain(known)
    longest = max(len(a), len(b))
    if longest == 0:
        return 1.0
    distance = Levenshtein.distance(a, b) / longest
    return 1.0 - distance if distance < ANLS_THRESHOLD else 0.0


def number_in(text: str) -> Fraction | None:
    """Reads the whole text as one number. Returns None if the text is not a number."""
    text = text.strip()
    match = _NUMBER.fullmatch(text) if len(text) <= _LONGEST_NUMBER else None
    return Fraction(match[1] + match[2].replace(",", "")) if match else None


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
