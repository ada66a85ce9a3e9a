"""When the gate may end early: the bound against exact binomial tails and against simulated series of answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvlm_trt.builders.quantization.early_verdict import is_at_least, is_decided, looks

MEANINGFUL = 0.1
LOOKS = (65, 130, 260, 500)  # of 500 samples of 13 tasks


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0.01, 0.99))
def test_no_more_certain_than_an_exact_binomial_test(count: int, rate: float, bound: float) -> None:
    right = round(count * rate)
    if is_at_least(np.repeat([1.0, 0.0], [right, count - right]), bound, lowest=0):
        # as many right answers, or more, if the true rate were `bound`
        tail = math.fsum(
            math.comb(count, k) * bound**k * (1 - bound) ** (count - k) for k in range(right, count + 1)
        )  # fmt: skip
        assert tail <= 1 / 100
        assert right / count > bound


def test_a_loss_at_the_bound_is_seldom_misjudged_in_four_looks() -> None:
    """2,000 gates of a loss of 1 point exactly, tasks unlike each other: neither verdict may come early often."""
    random = np.random.default_rng(0)
    losing = np.tile(np.linspace(0, 0.06, 13), 39)[:500]  # 3 % on average
    gaining = 0.02
    draws = random.random((2000, 500))
    losses = (draws < losing).astype(float) - (draws > 1 - gaining)
    passed = [any(is_at_least(-each[:n], -0.01, lowest=-1) for n in LOOKS) for each in losses]
    failed = [any(is_at_least(each[:n], 0.01, lowest=-1) for n in LOOKS) for each in losses]
    assert np.mean(passed) <= 0.01
    assert np.mean(failed) <= 0.01


def scores(count: int, lost: int, unquantised: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of an unquantised engine, and of one that gives `lost` more wrong answers."""
    before = np.full(count, unquantised)
    after = before.copy()
    after[:lost] = 0
    return before, after


@pytest.mark.parametrize(
    ("count", "lost", "max_drop", "decided"),
    [
        (500, 0, 0.01, False),  # 500 equal answers do not show a loss of less than 1 point
        (260, 0, 0.03, True),
        (260, 6, 0.03, False),
        (130, 0, 0.05, True),
        (65, 0, 0.05, False),
        (65, 40, 0.01, True),
        (65, 3, 0.01, False),
        (65, 0, 1.0, True),  # nothing can be lost beyond 100 points
        (65, 0, 0.0, False),
    ],
)
def test_verdicts(count: int, lost: int, max_drop: float, decided: bool) -> None:
    assert is_decided(*scores(count, lost), max_drop, MEANINGFUL) == decided


def test_an_engine_that_knows_nothing_is_soon_found_out() -> None:
    assert is_decided(*scores(65, 0, unquantised=0), 0.01, MEANINGFUL)
    assert not is_decided(*scores(40, 0, unquantised=0), 0.01, MEANINGFUL)
    # scores at the least that is judged by: neither the loss nor the lack of one counts
    assert not is_decided(*scores(500, 500, unquantised=MEANINGFUL), 0.01, MEANINGFUL)


def test_more_answers_of_a_kind_never_undo_a_verdict() -> None:
    for lost, max_drop in ((0, 0.05), (400, 0.01)):
        before, after = scores(400, lost)
        verdicts = [is_decided(before[:n], after[:n], max_drop, MEANINGFUL) for n in range(1, 401)]
        assert verdicts == sorted(verdicts)
        assert verdicts[-1]


@pytest.mark.parametrize(("allowance", "samples"), [(0.05, 116), (0.03, 195), (0.01, 590)])
def test_the_samples_that_the_documentation_names(allowance: float, samples: int) -> None:
    enough = [n for n in range(1, 700) if is_decided(*scores(n, 0), allowance, MEANINGFUL)]
    assert enough == list(range(samples, 700))
    unknown = [n for n in range(1, 100) if is_decided(*scores(n, 0, unquantised=0), allowance, MEANINGFUL)]
    assert unknown == list(range(57, 100))


def test_looks_are_at_whole_rounds() -> None:
    tasks = [39] * 6 + [38] * 7  # samples of 13 tasks: 500
    rounds = [[task for task in range(13) if number < tasks[task]] for number in range(39)]
    assert looks(rounds) == list(LOOKS)
    assert looks([[0]] * 14) == [14]
    assert looks([[0]] * 100) == [50, 100]
    assert looks([[0, 1]] * 3 + [[0]] * 200) == [206]  # the second task has too few samples for an early look
