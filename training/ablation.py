"""Repeats Tables 1 and 2 of the paper with tiny NVLM-D and -X: thumbnail only, tiles, tiles with 1-D tags.

`python -m training.ablation --work DIR` trains the six models from the same start, on small print alone, the three of
one architecture for the same number of steps, and writes DIR/ablation-{d,x}.json with exact match on the test split.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from training.accuracy import scene_accuracy
from training.language_stage import train_language
from training.mix import Mix
from training.packer import Packer
from training.run import Run
from training.schedule import Schedule

SHARES = {"ocr": 1.0, "form": 1.0, "tile": 1.0}


@dataclass(frozen=True)
class Sizes:
    """How long each model trains, and on how much data."""

    steps: Mapping[str, int]  # by model
    train_scenes: int
    test_scenes: int
    mix: Mix


SIZES = Sizes(
    steps={"d": 350, "x": 1000},  # NVLM-X reads its first codes at a step at which NVLM-D reads most codes
    train_scenes=6000,
    test_scenes=600,  # 200 pages of each kind; all questions about them are asked
    mix=Mix(texts=2),
)


@dataclass(frozen=True)
class Variant:
    """One way of showing a page to a model."""

    name: str
    tags: bool
    thumbnail_only: bool


VARIANTS = (
    Variant("thumbnail only", tags=True, thumbnail_only=True),
    Variant("tiles, no tags", tags=False, thumbnail_only=False),
    Variant("tiles, 1-D tags", tags=True, thumbnail_only=False),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="WORK of python -m training, common stages done")
    parser.add_argument("--models", nargs="*", choices=list(SIZES.steps), default=list(SIZES.steps))
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    run = Run(options.work, torch.device(options.device))
    for name in options.models:
        scores = {variant.name: train_variant(run, name, variant) for variant in VARIANTS}
        document = {
            "model": f"NVLM-{name.upper()}",
            "steps": SIZES.steps[name],
            "test_scenes": SIZES.test_scenes,
            "scores": scores,
        }
        (options.work / f"ablation-{name}.json").write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")


def train_variant(run: Run, name: str, variant: Variant, sizes: Sizes = SIZES) -> dict[str, float]:
    """Trains one model. Returns the share of exact matches by task on the test split."""
    model = run.model_with_vision(name)
    training = run.scenes(model, "train", sizes.train_scenes, "-small-print", SHARES)
    test = run.scenes(model, "test", sizes.test_scenes, "-small-print", SHARES)
    run.load(model, "language", prefix="language_model.", into="language_model.")
    run.align(model, f"ablation-align-{name}", training)
    packer = Packer(model.config, run.tokenizer, tags=variant.tags, thumbnail_only=variant.thumbnail_only)
    directory = run.work / f"ablation-{name}-{variant.name.replace(' ', '-').replace(',', '')}"
    steps = sizes.steps[name]
    schedule = Schedule(steps=steps, matrix_rate=3e-3, other_rate=2e-3, evaluate_every=steps)
    seed, questions = run.recipe.seed, run.recipe.text_questions
    train_language(model, packer, schedule, sizes.mix, directory, seed, training, test, questions)
    return scene_accuracy(model, packer, test)


if __name__ == "__main__":
    main()
