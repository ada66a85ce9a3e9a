"""Scenes with the features and labels of their tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from training.labels import Labels
from training.pages import Scene


@dataclass(frozen=True)
class SceneSet:
    """Scenes over a pool of tiles: the frozen encoder's features of each tile, and the labels of its patches."""

    scenes: Sequence[Scene]
    features: Tensor  # bfloat16 [tiles, T, 4 * vision width], shuffled
    labels: Labels  # [tiles, GRID, GRID, planes]
