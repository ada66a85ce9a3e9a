"""A packed sequence: many questions share one prefix, and none sees another.

The prefix is everything up to the question (system message and images). Each question with its answer is a branch
that attends to the prefix and itself, at the positions that it would have alone; so a branch computes exactly the
logits of a request of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NOT_ANSWERED = -100
# [n, 4]: head, query's place, key's place, and the query's number: the same for all keys that are right for it
Points = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackedSequence:
    """One packed sequence, without padding. `llm_tiles` and `cross_tiles` are rows of the pool of tiles."""

    ids: npt.NDArray[np.int64]  # [S]
    positions: npt.NDArray[np.int64]  # [S]
    branch: npt.NDArray[np.int64]  # [S], 0 is the prefix
    ranges: npt.NDArray[np.int32]  # [S, 2]
    labels: npt.NDArray[np.int64]  # [S], the next token if it is part of an answer
    weights: npt.NDArray[np.float32]  # [S]
    llm_tiles: tuple[int, ...]
    cross_tiles: tuple[int, ...]  # tile rows
    cross_tags: tuple[int, ...]  # each cross-attended tile's number in its image, from 0
    self_points: Points  # keys are places in the sequence
    cross_points: Points  # keys are cross-attended tokens
