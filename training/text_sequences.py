"""Draws sequences of text-only questions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nvlm_trt.evaluation.tinydocs import ask
from training.packed_sequence import PackedSequence
from training.packer import Packer

TEXT_SHARES = {"copy": 0.3, "reverse": 0.35, "add": 0.35}
_SEEDS = {"train": 11, "validation": 12}


def text_sequences(
    packer: Packer, split: str, seed: Sequence[int], count: int, questions: int, shares: dict[str, float] = TEXT_SHARES
) -> list[PackedSequence]:
    """Draws `count` sequences of `questions` questions each, by task as often as `shares` says."""
    random = np.random.default_rng([_SEEDS[split], *seed])
    tasks, weights = list(shares), np.array(list(shares.values()))
    chosen = random.choice(len(tasks), (count, questions), p=weights / weights.sum())
    return [packer.pack((), [ask(tasks[task], random) for task in row]) for row in chosen]
