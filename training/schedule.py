"""Says how many steps a training stage takes, and how fast it learns at each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Learning rates peak after `warmup` steps, stay for 40 % of the other steps and fall to 2 % linearly."""

    steps: int
    matrix_rate: float  # Muon, for the layers' matrices
    other_rate: float  # AdamW, for embeddings, norms, biases, gates and the head
    projector_rate: float = 1.0  # times matrix_rate; at 1, a hundred steps undo the alignment
    warmup: int = 50
    weight_decay: float = 0.01
    log_every: int = 25
    save_every: int = 200
    evaluate_every: int = 500


def rate_factor(step: int, schedule: Schedule) -> float:
    """Returns the share of the peak rates at a step."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    done = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return max(0.02, 1 - max(0.0, done - 0.4) / 0.6)
