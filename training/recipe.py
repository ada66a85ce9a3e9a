"""What is trained, for how long: the one table that `python -m training` follows."""

from __future__ import annotations

from dataclasses import dataclass

from training.language_stage import Mix
from training.loop import Stage

SEED = 1
DENSE_TILES = 30_000  # of the vision encoder's training, and as many of ordinary pages
SCENES = 24_000
VALIDATION_SCENES = 600

VISION = Stage(steps=4000, matrix_rate=3e-3, other_rate=3e-3, warmup=100, evaluate_every=400)
TEXT = Stage(steps=800, matrix_rate=4e-3, other_rate=3e-3, evaluate_every=200)
ALIGNMENT = Stage(steps=600, matrix_rate=3e-3, other_rate=3e-3, warmup=20, evaluate_every=600)


@dataclass(frozen=True)
class Tuning:
    stage: Stage
    start: str  # whose language model it starts from: text, or another model
    mix: Mix = Mix()


TUNING = {
    "d": Tuning(Stage(steps=5000, matrix_rate=3e-3, other_rate=2e-3, evaluate_every=500), start="text"),
    "x": Tuning(Stage(steps=5000, matrix_rate=3e-3, other_rate=2e-3, evaluate_every=500), start="d"),
    "h": Tuning(Stage(steps=4000, matrix_rate=3e-3, other_rate=2e-3, evaluate_every=500), start="d"),
}
TEXT_MIX = Mix(texts=8, text_questions=12)
