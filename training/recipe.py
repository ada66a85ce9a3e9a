"""What is trained, for how long: the one table that `python -m training` follows."""

from __future__ import annotations

from training.language_stage import Mix
from training.loop import Stage

SEED = 1
DENSE_TILES = 30_000  # of the vision encoder's training, and as many of ordinary pages
SCENES = 24_000
VALIDATION_SCENES = 600
# of the pages; codes and forms take longest to learn, and a page of shapes has four kinds of question
PAGE_SHARES = {"ocr": 5.0, "form": 4.0, "line": 3.0, "sum": 4.0, "colour": 5.0, "chart": 2.5, "pair": 1.5}

VISION = Stage(steps=7000, matrix_rate=3e-3, other_rate=3e-3, warmup=100, evaluate_every=400)
LANGUAGE = Stage(steps=2000, matrix_rate=3e-3, other_rate=2e-3)
ALIGNMENT = Stage(steps=400, matrix_rate=3e-3, other_rate=3e-3, warmup=20, evaluate_every=400)


# D and X start from the language model of the stage `language`; NVLM-H is NVLM-D with cross-attention for the tiles
START = {"h": "tune-d"}
TUNING = {
    "d": Stage(steps=4000, matrix_rate=3e-3, other_rate=2e-3, evaluate_every=500, projector_rate=0.15),
    "x": Stage(steps=7600, matrix_rate=3e-3, other_rate=2e-3, evaluate_every=500),
    "h": Stage(steps=2600, matrix_rate=3e-3, other_rate=2e-3, evaluate_every=500, projector_rate=0.15),
}
MIX = Mix(texts=3, likelier={"sum": 4.0, "pair": 3.0})  # these take longest to learn
LANGUAGE_MIX = Mix(texts=4)
