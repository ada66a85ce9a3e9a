"""Trains the projector (stage 3) to turn each tile's features into image tokens that the language model can read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nvlm_trt.reference.model import ReferenceModel
from training.loop import Losses, train
from training.scene_set import SceneSet
from training.schedule import Schedule
from training.targets import TokenTargets

_EMPTY_WEIGHT = 0.1  # weight of image tokens that show nothing, as most do


def train_alignment(
    model: ReferenceModel,
    targets: TokenTargets,
    schedule: Schedule,
    directory: Path,
    seed: int,
    training: SceneSet,
    batch: int,
    checks: int,
) -> None:
    """Fits `model.mlp1` to the targets of the scenes' labels; changes nothing else.

    A step takes `batch` tiles, an evaluation `checks` tiles.
    """
    model.requires_grad_(False)
    model.mlp1.requires_grad_(True)
    features, labels = training.features, torch.from_numpy(training.labels).to(training.features.device)
    device = features.device

    def squared_error(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> error [tokens], weight [tokens], targets [tokens, hidden]"""
        wanted, shows = targets.of(labels[rows])
        with torch.autocast(device.type, torch.bfloat16):
            made = model.mlp1(features[rows].float())
        return (made.float() - wanted).square().mean(-1), torch.where(shows, 1.0, _EMPTY_WEIGHT), wanted

    def losses_at(step: int) -> Iterator[Losses]:
        rows = np.random.default_rng([seed, 4, step]).integers(0, len(features), batch)
        error, weight, _ = squared_error(torch.from_numpy(rows).to(device))
        yield {"loss": (error * weight).sum() / weight.sum()}

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        rows = np.random.default_rng([seed, 5]).integers(0, len(features), checks)
        error, weight, wanted = squared_error(torch.from_numpy(rows).to(device))
        shown = weight == 1
        spread = (wanted[shown] - wanted[shown].mean(0)).square().mean()
        return {"r2": 1 - float(error[shown].mean() / spread)}

    train(model.mlp1, schedule, directory, losses_at, evaluate)
    model.requires_grad_(True)
