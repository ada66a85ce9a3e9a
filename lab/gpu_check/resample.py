"""Checks the 8-bit levels of tile_resample against exact arithmetic and against Pillow, and times tile_resample."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lab.gpu_check.measure import COPY, ceiling, cold_copies, gpu_seconds
from lab.gpu_check.record import MEASURED, PASSED, SLOW, WRONG, NotAvailableError, Record, Result, Trial, Value
from nvlm_trt.plugins.tile_resample.coefficients import WEIGHT_BITS, PassTables, is_vertical_first, resize_plan
from nvlm_trt.plugins.tile_resample.launcher import tile_resample

SECTION = "tile_resample"
TARGET_MS = 0.3  # for LARGE, on an H200

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class TiledImage(NamedTuple):
    """An image's size, and the grid of tiles that it becomes."""

    width: int
    height: int
    columns: int
    rows: int
    tile: int = 448

    def __str__(self) -> str:
        return f"{self.width} x {self.height} to {self.columns} x {self.rows} tiles of {self.tile}"


LARGE = TiledImage(3840, 2160, 3, 2)
IMAGES = (
    LARGE,
    TiledImage(1000, 3000, 1, 3),  # vertically first
    TiledImage(300, 200, 3, 2),  # enlarged
    TiledImage(900, 30, 6, 1),  # a strip
    TiledImage(448, 448, 1, 1),  # as it is, no thumbnail
)
SMALL = (TiledImage(40, 200, 1, 2, tile=16), TiledImage(9, 5, 3, 2, tile=8))
TINY = TiledImage(5, 3, 1, 1, tile=8)


def noise(tiling: TiledImage, device: str) -> Tensor:
    """Draws black or white in every channel: bicubic overshoots most, and rounding between the passes shows most."""
    random = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2, (tiling.height, tiling.width, 3), generator=random, dtype=torch.uint8)
    return (bits * 255).to(device)


def levels_of(tiles: Tensor) -> Tensor:
    """Undoes the normalisation: whole numbers in float64 [n, 3, E, E]."""
    mean, std = (torch.tensor(values, dtype=torch.float64, device=tiles.device) for values in (_MEAN, _STD))
    return ((tiles.double() * std[:, None, None] + mean[:, None, None]) * 255).round()


def exact_levels(image: Tensor, tiling: TiledImage) -> Tensor:
    """Computes tile_resample's passes in float64, which holds the products of whole numbers exactly: [n, 3, E, E]."""
    width, height, columns, rows, tile = tiling
    plan = resize_plan(*tiling)
    sizes = [(columns * tile, rows * tile), (tile, tile)]
    orders = plan.tiles_vertical_first, plan.thumbnail_vertical_first
    resized = []
    start = [0, 0]  # the thumbnail's entries follow those of the tiles
    for (to_width, to_height), order in zip(sizes, orders, strict=True):
        counts = (to_height, to_width) if order else (to_width, to_height)
        sources = (height, width) if order else (width, height)
        plane = image.permute(2, 0, 1).double()  # [3, height, width]
        plane = plane.transpose(1, 2) if order else plane
        for number, tables in enumerate(plan[:2]):
            entries = slice(start[number], start[number] + counts[number])
            matrix = _dense(tables, entries, sources[number], image.device)  # [entries, source]
            plane = _to_levels(plane @ matrix.T).transpose(1, 2)
            start[number] += counts[number]
        resized.append(plane.transpose(1, 2) if order else plane)
    return _cut(resized[0], resized[1], tiling)


def _dense(tables: PassTables, entries: slice, source: int, device: torch.device) -> Tensor:
    bounds = torch.tensor(tables.bounds[entries]).long()
    parts = torch.tensor(tables.weights[entries]).double()  # [entries, taps, 2]
    weights = parts[..., 0] * 4096 + parts[..., 1]
    at = bounds[:, :1] + torch.arange(weights.shape[1])
    matrix = torch.zeros(len(bounds), source + weights.shape[1], dtype=torch.float64).scatter_(1, at, weights)
    return matrix[:, :source].to(device)


def _to_levels(sums: Tensor) -> Tensor:
    """Rounds as Pillow does, and clips."""
    return ((sums + 2.0 ** (WEIGHT_BITS - 1)) / 2.0**WEIGHT_BITS).floor().clamp(0, 255)


def _cut(canvas: Tensor, thumbnail: Tensor, tiling: TiledImage) -> Tensor:
    """Cuts [3, rows * E, columns * E] row by row and, if there are several tiles, adds the thumbnail: [n, 3, E, E]."""
    columns, rows, size = tiling[2:]
    tiles = canvas.unflatten(2, (columns, size)).unflatten(1, (rows, size)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    return torch.cat([tiles, thumbnail[None]]) if columns * rows > 1 else tiles


def pillow_levels(image: Tensor, tiling: TiledImage) -> Tensor:
    """Resizes with Pillow: [n, 3, E, E]. Raises NotAvailableError without Pillow, or if it resizes in another order."""
    try:
        import numpy as np
        import PIL
        from PIL import Image
    except ImportError:
        raise NotAvailableError("Pillow is not installed") from None
    width, height, columns, rows, tile = tiling
    sizes = (columns * tile, rows * tile), (tile, tile)
    is_old = int(PIL.__version__.split(".")[0]) < 13
    if is_old and any(is_vertical_first(width, height, *size) for size in sizes):
        raise NotAvailableError(f"Pillow {PIL.__version__} resizes horizontally first here, 13 does not")
    source = Image.fromarray(image.cpu().numpy())
    resized = [np.array(source.resize(size, Image.Resampling.BICUBIC)) for size in sizes]
    canvas, thumbnail = (torch.from_numpy(levels).permute(2, 0, 1).double() for levels in resized)
    return _cut(canvas, thumbnail, tiling)


def compare(tiling: TiledImage, device: str, pillow: bool) -> Result:
    """Compares the fp32 tiles' levels with Pillow's or with exact ones. The kernel is meant to give equal levels."""
    image = noise(tiling, device)
    expected = pillow_levels(image, tiling).to(device) if pillow else exact_levels(image, tiling)
    tiles = tile_resample(image, *tiling[2:], torch.float32)
    difference = (levels_of(tiles) - expected).nan_to_num(255).abs()
    within = float((difference <= 1).double().mean())
    largest = int(difference.max())
    equal = float((difference == 0).double().mean())
    values: dict[str, Value] = {"largest difference": largest, "within 1 level": within, "equal": equal}
    good = tiles.shape == expected.shape and within >= 0.999 and largest <= 2
    return Result(PASSED if good else WRONG, values, "limits 2 and 0.999")


def types(tiling: TiledImage, device: str, dtypes: list[torch.dtype]) -> Result:
    """Checks that fp16 and bf16 tiles are the fp32 tiles, rounded."""
    image = noise(tiling, device)
    whole = tile_resample(image, *tiling[2:], torch.float32)
    wrong = [str(dtype) for dtype in dtypes if not tile_resample(image, *tiling[2:], dtype).equal(whole.to(dtype))]
    return Result(WRONG if wrong else PASSED, note="differ: " + ", ".join(wrong) if wrong else "")


def speed(record: Record) -> Result:
    """Times bf16 tiles of several images, used in turn to keep the L2 cache cold."""
    images = cold_images(LARGE)
    seconds = gpu_seconds([partial(tile_resample, image, *LARGE[2:]) for image in images])
    moved = images[0].nbytes + 2 * 7 * 3 * LARGE.tile**2
    rate = moved / seconds / 1e9
    values: dict[str, Value] = {"ms": seconds * 1e3, "GB/s": rate, "of the copy's": rate / ceiling(record, COPY)}
    return Result(PASSED if seconds * 1e3 < TARGET_MS else SLOW, values, f"target {TARGET_MS} ms on an H200")


def cold_images(tiling: TiledImage) -> list[Tensor]:
    """Makes as many images on the GPU as keep the L2 cache cold."""
    image = noise(tiling, "cuda")
    return [image.clone() for _ in range(cold_copies([image]))]


def torchvision_speed() -> Result:
    """Times the same tiles by torchvision: two resizes, the cut, the normalisation."""
    try:
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import resize
    except ImportError:
        raise NotAvailableError("torchvision is not installed") from None
    mean, std = (torch.tensor(values, device="cuda")[:, None, None] * 255 for values in (_MEAN, _STD))

    def tiles(image: Tensor) -> Tensor:
        planes = image.permute(2, 0, 1)
        sizes = [LARGE.rows * LARGE.tile, LARGE.columns * LARGE.tile], [LARGE.tile, LARGE.tile]
        canvas, thumbnail = (resize(planes, size, InterpolationMode.BICUBIC, antialias=True) for size in sizes)
        return ((_cut(canvas, thumbnail, LARGE) - mean) / std).to(torch.bfloat16)

    seconds = gpu_seconds([partial(tiles, image) for image in cold_images(LARGE)])
    return Result(MEASURED, {"ms": seconds * 1e3})


def trials(device: str, record: Record) -> Iterator[Trial]:
    """Yields the trials; on a GPU also those that measure times."""
    on_gpu = device != "cpu"
    for tiling in IMAGES if on_gpu else SMALL:
        yield f"exact arithmetic: {tiling}", partial(compare, tiling, device, pillow=False)
        yield f"Pillow: {tiling}", partial(compare, tiling, device, pillow=True)
    # the interpreter rounds bf16 its own way
    dtypes = [torch.float16, torch.bfloat16] if on_gpu else [torch.float16]
    yield "rounded to 16 bits", partial(types, TINY, device, dtypes)
    if on_gpu:
        yield f"time: {LARGE}", partial(speed, record)
        yield "time: the same by torchvision", torchvision_speed
