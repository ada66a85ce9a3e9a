"""Stage 3: the projector learns to make of each tile the tokens that the language model has learned to read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nvlm_trt.reference.model import ReferenceModel
from training.language_stage import SceneSet
from training.loop import Losses, Stage, train
from training.targets import TokenTargets

BATCH = 256
_EMPTY_WEIGHT = 0.1  # most tokens show nothing


def train_alignment(
    model: ReferenceModel,
    targets: TokenTargets,
    stage: Stage,
    directory: Path,
    seed: int,
    training: SceneSet,
) -> None:
    """Regress `model.mlp1` on the targets of the scenes' labels; nothing else changes."""
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
        rows = np.random.default_rng([seed, 4, step]).integers(0, len(features), BATCH)
        error, weight, _ = squared_error(torch.from_numpy(rows).to(device))
        yield {"loss": (error * weight).sum() / weight.sum()}

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        rows = np.random.default_rng([seed, 5]).integers(0, len(features), 2000)
        error, weight, wanted = squared_error(torch.from_numpy(rows).to(device))
        shown = weight == 1
        spread = (wanted[shown] - wanted[shown].mean(0)).square().mean()
        return {"r2": 1 - float(error[shown].mean() / spread)}

    train(model.mlp1, stage, directory, losses_at, evaluate)
    model.requires_grad_(True)
