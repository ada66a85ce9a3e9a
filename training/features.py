"""Computes the frozen encoder's features of every tile of a set of scenes once, for all later stages."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nvlm_trt.evaluation.tinydocs import Split
from nvlm_trt.evaluation.tinydocs.kinds import Question
from nvlm_trt.reference.model import ReferenceModel
from nvlm_trt.reference.vision import pixel_shuffle
from training.forward import encode_patches
from training.pages import Scene, Shares, scenes
from training.scene_set import SceneSet


def scene_features(
    model: ReferenceModel, split: Split, seed: int, count: int, shares: Shares, path: Path, device: torch.device
) -> SceneSet:
    """Draws scenes of a split and computes their features, or reads both from `path` if it exists."""
    if not path.exists():
        pixels, labels, made = scenes(split, seed, count, shares)
        parts = [_features(model, part.to(device)).cpu() for part in torch.from_numpy(pixels).split(512)]
        told = [[[[tiles.start, tiles.stop] for tiles in s.images], [asdict(q) for q in s.questions]] for s in made]
        partial = path.with_suffix(".partial")
        save_file(
            {"features": torch.cat(parts), "labels": torch.from_numpy(labels)},
            partial,
            {"scenes": json.dumps(told, allow_nan=False)},
        )
        partial.replace(path)
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["scenes"])
        features, labels = file.get_tensor("features").to(device), file.get_tensor("labels").numpy()
    loaded = [
        Scene(tuple(range(*bounds) for bounds in images), tuple(Question(**question) for question in questions))
        for images, questions in told
    ]
    return SceneSet(loaded, features, labels)


@torch.no_grad()
def _features(model: ReferenceModel, pixels: Tensor) -> Tensor:
    """uint8 [n, E, E, 3] -> bfloat16 [n, T, 4 * vision width]"""
    with torch.autocast(pixels.device.type, torch.bfloat16):
        patches = encode_patches(model.vision_model, pixels)
    return pixel_shuffle(patches, model.config.pixel_shuffle).to(torch.bfloat16)
