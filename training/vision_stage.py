"""Trains the vision encoder (stage 1) to label each patch. Later stages keep it frozen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvlm_trt.evaluation.tinydocs import Split
from nvlm_trt.model.config import VisionConfig
from nvlm_trt.reference.vision import VisionEncoder
from training.forward import encode_patches
from training.labels import GRID, IGNORE, PLANES
from training.loop import Losses, train
from training.pages import Shares, dense_tiles, scenes
from training.schedule import Schedule
from training.state import trained_steps

_LAYER_SCALE = 0.5
# letters are the hardest to learn; the rest follows from position, size and colour
_WEIGHTS = {"kind": 1.0, "character": 2.5, "number": 1.0}
_OTHER_WEIGHT = 0.4


class LabelledEncoder(nn.Module):
    """A vision encoder with a linear head per plane of labels."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.encoder = VisionEncoder(config)
        self.head = nn.Linear(config.hidden_size, sum(PLANES.values()))
        embeddings = self.encoder.embeddings
        nn.init.normal_(embeddings.class_embedding, std=0.02)
        nn.init.normal_(embeddings.position_embedding, std=0.02)
        for name, parameter in self.encoder.named_parameters():
            if name.endswith((".ls1", ".ls2")):
                nn.init.constant_(parameter, _LAYER_SCALE)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 [n, E, E, 3] -> by plane, logits [n * GRID * GRID, classes]"""
        logits = self.head(encode_patches(self.encoder, pixels)).flatten(0, 1).float()
        return dict(zip(PLANES, logits.split(list(PLANES.values()), dim=-1), strict=True))


def train_vision(
    config: VisionConfig,
    schedule: Schedule,
    directory: Path,
    seed: int,
    tiles: int,
    shares: Shares,
    device: torch.device,
    batch: int,
) -> None:
    """Trains on `tiles` dense tiles and as many of ordinary pages, `batch` tiles a step."""
    if trained_steps(directory / "state.safetensors") >= schedule.steps:
        return
    torch.manual_seed(seed)
    model = LabelledEncoder(config).to(device)
    pixels, labels = _tiles("train", seed, tiles, shares)
    checks = _tiles("validation", seed, tiles // 20, shares)

    def losses_at(step: int) -> Iterator[Losses]:
        epoch, position = divmod(step * batch, len(pixels) - batch)
        order = np.random.default_rng([seed, epoch]).permutation(len(pixels))
        chosen = torch.from_numpy(np.sort(order[position : position + batch]))
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(pixels[chosen].to(device))
        losses = plane_losses(logits, labels[chosen].to(device))
        losses["loss"] = torch.stack([_WEIGHTS.get(name, _OTHER_WEIGHT) * loss for name, loss in losses.items()]).sum()
        yield losses

    train(model, schedule, directory, losses_at, lambda: plane_accuracy(model, *checks, device))


def _tiles(split: Split, seed: int, count: int, shares: Shares) -> tuple[Tensor, Tensor]:
    """Draws dense tiles and tiles of ordinary pages; keeps few tiles that show nothing."""
    dense = dense_tiles(split, seed, count)
    pixels, labels, _ = scenes(split, seed + 1, max(1, count // 3), shares)
    labels_flat = labels.reshape(len(labels), -1, len(PLANES))
    worth = (labels_flat[..., 0] > 0).any(1) | (np.random.default_rng(seed).random(len(labels)) < 0.05)
    pixels, labels = pixels[worth][:count], labels[worth][:count]
    return (
        torch.from_numpy(np.concatenate([dense[0], pixels])),
        torch.from_numpy(np.concatenate([dense[1], labels])),
    )


def plane_losses(logits: dict[str, Tensor], labels: Tensor) -> Losses:
    """Returns the cross entropy by plane against `labels` [n, GRID, GRID, planes]; zero for a plane without labels."""
    losses: Losses = {}
    for number, (name, classes) in enumerate(PLANES.items()):
        target = labels[..., number].flatten().long()
        weight = torch.ones(classes, device=labels.device)
        if name == "kind":
            weight[0] = 0.3  # most patches are empty
        total = F.cross_entropy(logits[name], target, weight, ignore_index=IGNORE, reduction="sum")
        known = target[target != IGNORE]
        losses[name] = total / weight[known].sum().clamp(min=1)
    return losses


@torch.no_grad()
def plane_accuracy(model: LabelledEncoder, pixels: Tensor, labels: Tensor, device: torch.device) -> dict[str, float]:
    """Returns the share of labelled patches whose class is right; for `kind`, of patches that show something."""
    right, known = dict.fromkeys(PLANES, 0), dict.fromkeys(PLANES, 0)
    for part, target in zip(pixels.split(500), labels.split(500), strict=True):
        target = target.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(part.to(device))
        for number, name in enumerate(PLANES):
            wanted = target.view(len(part) * GRID * GRID, -1)[:, number].long()
            counted = wanted > 0 if name == "kind" else wanted != IGNORE
            right[name] += int((logits[name].argmax(-1) == wanted)[counted].sum())
            known[name] += int(counted.sum())
    return {name: right[name] / max(1, known[name]) for name in PLANES}
