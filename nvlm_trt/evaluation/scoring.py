"""How an answer is scored against the known one, and how sure a mean of such scores is. Every score is in 0..1.

exact     1 if both are the same text once white space around them is gone; case counts.
contains  1 if the known answer occurs in the given one; both in lower case, runs of white space as one space.
          OCRBench's rule (Liu et al. 2023, arXiv 2305.07895). It finds "2" in "12" too.
anls      Average normalized Levenshtein similarity (Biten et al. 2019, arXiv 1905.13648), as DocVQA uses
          it: s = 1 - NL if NL < 0.5, else 0, where NL = Levenshtein(a, b) / max(|a|, |b|); lower case and runs of
          white space as for `contains`. With the single known answer of a sample there is no maximum to take.
numeric   1 if both are numbers p and a with |p - a| <= tolerance * |a|: ChartQA's relaxed accuracy (Masry et al. 2022,
          arXiv 2203.10244) has tolerance 0.05. The whole answer must be the number; a currency sign before it, a
          percent sign behind it and commas between thousands are ignored. Compared exactly, without rounding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nvlm_trt.evaluation.samples import Metric

ANLS_THRESHOLD = 0.5
_Z = NormalDist().inv_cdf(0.975)  # 1.96: 95 %, two-sided
_NUMBER = re.compile(r"[$€£¥]? ?([+-]?)[$€£¥]?((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+) ?%?")
_LONGEST_NUMBER = 100  # characters; what is longer is no quantity, and Python refuses to read thousands of digits


def score(metric: Metric, given: str, known: str, tolerance: float = 0.0) -> float:
    """How good the given answer is, 0..1; `tolerance` is relative and for `numeric` only."""
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
    # through str: the tolerance is the decimal fraction that was typed, not its nearest binary one
    return float(abs(given_number - known_number) <= Fraction(str(tolerance)) * abs(known_number))


def anls(given: str, known: str) -> float:
    a, b = _plain(given), _plain(known)
    longest = max(len(a), len(b))
    if longest == 0:
        return 1.0
    distance = levenshtein(a, b) / longest
    return 1.0 - distance if distance < ANLS_THRESHOLD else 0.0


def levenshtein(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions of a character that turn `a` into `b`."""
    above = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        row = [i]
        for j, right in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (left != right)))
        above = row
    return above[-1]


def number_in(text: str) -> Fraction | None:
    """The number that the whole text is; None if it is not one."""
    text = text.strip()
    match = _NUMBER.fullmatch(text) if len(text) <= _LONGEST_NUMBER else None
    return Fraction(match[1] + match[2].replace(",", "")) if match else None


def wilson_interval(mean: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927; method 3 of Newcombe 1998, without continuity correction).

    For scores between 0 and 1 (anls) it is wider than need be, never narrower: their variance is at most
    mean * (1 - mean), which is that of scores 0 and 1 with the same mean.
    """
    assert count > 0, "no samples, no interval"
    square = _Z * _Z
    center = (mean + square / (2 * count)) / (1 + square / count)
    half = _Z / (1 + square / count) * math.sqrt(mean * (1 - mean) / count + square / (4 * count * count))
    # rounding must not push the mean out of its own interval
    return max(0.0, min(mean, center - half)), min(1.0, max(mean, center + half))


def mean_interval(parts: Sequence[tuple[float, tuple[float, float]]]) -> tuple[float, float]:
    """95 % interval of the mean of independent (mean, interval): square-and-add, as Newcombe 1998 (and MOVER, Zou and
    Donner 2008) combine Wilson intervals: each side's distances add like errors, so the interval stays within 0..1.
    """
    assert parts, "no parts, no interval"
    mean = math.fsum(part for part, _ in parts) / len(parts)
    below = math.sqrt(math.fsum((part - low) ** 2 for part, (low, _) in parts)) / len(parts)
    above = math.sqrt(math.fsum((high - part) ** 2 for part, (_, high) in parts)) / len(parts)
    return mean - below, mean + above


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
