"""Tiling in plain torch: the oracle for nvlm_trt.image.tiling."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

MEAN = torch.tensor([0.485, 0.456, 0.406])
STD = torch.tensor([0.229, 0.224, 0.225])


def reference_grid(width: int, height: int, tile_size: int, max_tiles: int) -> tuple[int, int]:
    """Returns InternVL's grid (columns, rows), the nearest in shape; ties go to the larger one if pixels suffice.

    Compares in float64, as InternVL does: 5 / 12 is as far from 1 / 2 as from 1 / 3, but nearer to 1 / 2 in floats.
    """
    grids = [(i, j) for i in range(1, max_tiles + 1) for j in range(1, max_tiles + 1) if i * j <= max_tiles]
    grids.sort(key=lambda grid: grid[0] * grid[1])
    best, best_distance = (1, 1), float("inf")
    for i, j in grids:
        distance = abs(width / height - i / j)
        enough_pixels = 2 * width * height > tile_size**2 * i * j
        if distance < best_distance or (distance == best_distance and enough_pixels):
            best, best_distance = (i, j), distance
    return best


def reference_tiles(image: Image.Image, tile_size: int, max_tiles: int) -> torch.Tensor:
    """RGB image -> float32 [tiles, 3, tile_size, tile_size], row by row, the thumbnail last if there are several."""
    columns, rows = reference_grid(*image.size, tile_size, max_tiles)
    whole = _pixels(image, (columns * tile_size, rows * tile_size))  # [3, rows * E, columns * E]
    tiles = [
        whole[:, row * tile_size : (row + 1) * tile_size, column * tile_size : (column + 1) * tile_size]
        for row in range(rows)
        for column in range(columns)
    ]
    if len(tiles) > 1:
        tiles.append(_pixels(image, (tile_size, tile_size)))
    return torch.stack(tiles)


def _pixels(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """Resizes to (width, height) and normalises -> [3, height, width]."""
    resized = torch.from_numpy(np.array(image.resize(size, Image.Resampling.BICUBIC)))
    return ((resized.float() / 255 - MEAN) / STD).permute(2, 0, 1)
