"""Tells whether the answers so far decide the gate's verdict, so that the other questions need not be asked.

A claim such as "the loss is above 1 point" is tested by a bet against it. Each score multiplies the stake by
1 + share * (score - bound), whose mean is at most 1 if the claim is true; the claim counts as refuted when the money
reaches 100 times the stake. If the claim is true, that happens with a probability of at most 1/100, however often one
looks (Ville's inequality). So several looks need no correction, and nothing is assumed about the scores but their range
and that samples are independent (Waudby-Smith and Ramdas 2024, arXiv 2010.09686). For rounds of one sample per task, a
claim about the mean over the tasks is enough: the product of their factors' means is at most the power of the average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_REFUTED = 100.0
_SHARES = np.array([1.0, 0.5, 0.25, 0.125])  # of the largest that leaves no debt; the stake is split evenly among them

Scores = npt.NDArray[np.float64]  # [samples], in 0..1, of whole rounds: each task equally often


def is_decided(unquantised: Scores, quantised: Scores, max_drop: float, meaningful: float) -> bool:
    """Return whether the verdict is beyond doubt, from the scores of the same samples.

    `max_drop`: the loss that the gate allows, 0..1; `meaningful`: the least score of an unquantised engine that the
    gate judges by."""
    if is_at_least(1 - unquantised, 1 - meaningful, lowest=0):
        return True
    losses = unquantised - quantised
    return is_at_least(unquantised, meaningful, lowest=0) and (
        is_at_least(-losses, -max_drop, lowest=-1) or is_at_least(losses, max_drop, lowest=-1)
    )


def is_at_least(scores: Scores, bound: float, lowest: float) -> bool:
    """Return whether the mean of such scores is `bound` or more: wrongly in at most 1 of 100 series of scores, however
    often this function is called as a series goes on. No score is below `lowest`."""
    if bound <= lowest:
        return True
    shares = _SHARES / (bound - lowest)
    changes = np.maximum(np.outer(shares, scores - bound), -1)  # [shares, samples]
    with np.errstate(divide="ignore"):  # the largest share may be lost whole
        money = np.log1p(changes).sum(1)
    return float(np.logaddexp.reduce(money)) >= math.log(_REFUTED * len(_SHARES))


def looks(rounds: Sequence[Sequence[object]]) -> list[int]:
    """Return after how many samples to look at a verdict: an eighth, a quarter and half of them, then all.

    Before the end, only after rounds in which every task has a sample, and not below 32 samples: opening two engines
    again takes longer than asking the few that would be saved."""
    total, tasks = sum(map(len, rounds)), len(rounds[0])
    whole = sum(len(each) == tasks for each in rounds)
    early = {tasks * math.ceil(total * share / tasks) for share in (1 / 8, 1 / 4, 1 / 2)}
    return [*sorted(count for count in early if 32 <= count <= whole * tasks and count < total), total]
