"""The table that `python -m training` follows: the stages, how long each trains, and on how much data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.presets import PRESETS
from training.mix import Mix
from training.schedule import Schedule


@dataclass(frozen=True)
class Recipe:
    """Sizes and schedules of all stages."""

    models: Mapping[str, NvlmConfig]  # by name; the vision encoder and the sizes of the LLM are the same in all
    seed: int
    tokenizer_rounds: int  # rounds of questions of every task, from which the tokenizer learns its words
    dense_tiles: int  # of the vision encoder's training, and as many tiles of ordinary pages
    scenes: int
    validation_scenes: int
    text_questions: int  # of each text-only task in an evaluation; a multiple of 10
    page_shares: Mapping[str, float]  # task -> share of the pages
    vision: Schedule
    vision_batch: int  # tiles
    language: Schedule
    language_mix: Mix
    alignment: Schedule
    alignment_batch: int  # tiles
    alignment_checks: int  # tiles of an evaluation
    tuning: Mapping[str, Schedule]  # by model
    tuning_mix: Mix
    tuning_start: Mapping[str, str]  # model -> the stage that it starts from, by default `language`


# the recipe of the models in checkpoints/
RECIPE = Recipe(
    models={name: PRESETS[f"nvlm-{name}-tiny"] for name in ("d", "x", "h")},
    seed=1,
    tokenizer_rounds=300,
    dense_tiles=30_000,
    scenes=24_000,
    validation_scenes=600,
    text_questions=200,
    # codes and forms take longest to learn, and a page of shapes has four kinds of question
    page_shares={"ocr": 5.0, "form": 4.0, "line": 3.0, "sum": 4.0, "colour": 5.0, "chart": 2.5, "pair": 1.5},
    vision=Schedule(steps=7000, matrix_rate=3e-3, other_rate=3e-3, warmup=100, evaluate_every=400),
    vision_batch=128,
    language=Schedule(steps=2000, matrix_rate=3e-3, other_rate=2e-3),
    language_mix=Mix(texts=4),
    alignment=Schedule(steps=400, matrix_rate=3e-3, other_rate=3e-3, warmup=20, evaluate_every=400),
    alignment_batch=256,
    alignment_checks=2000,
    tuning={
        "d": Schedule(steps=4000, matrix_rate=3e-3, other_rate=2e-3, evaluate_every=500, projector_rate=0.15),
        "x": Schedule(steps=7600, matrix_rate=3e-3, other_rate=2e-3, evaluate_every=500),
        "h": Schedule(steps=2600, matrix_rate=3e-3, other_rate=2e-3, evaluate_every=500, projector_rate=0.15),
    },
    tuning_mix=Mix(texts=3, likelier={"sum": 4.0, "pair": 3.0}),  # these tasks take longest to learn
    tuning_start={"h": "tune-d"},  # NVLM-H is NVLM-D with cross-attention for the tiles
)
