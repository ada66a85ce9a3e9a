"""Runs tile_resample on torch tensors.

Only lab/gpu_check and the tests call this launcher; a backend that decodes images on the GPU would call it, too.
"""

from __future__ import annotations

import functools
import typing

import torch
import triton
from torch import Tensor

from nvlm_trt.plugins.tile_resample.coefficients import block_tables, resize_plan
from nvlm_trt.plugins.tile_resample.kernel import planes_kernel, tile_resample_kernel

# ImageNet's statistics of RGB in 0..1, the same as in nvlm_trt.image.tiling
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)

BLOCK = 32  # output pixels per side of a program
SOURCE = 64  # source pixels per side of a step
WARPS = 2
_ALIGN = 16  # bytes that one load takes
_QUADS = 256  # groups of four pixels per program of planes_kernel


def tile_resample(
    image: Tensor, columns: int, rows: int, tile_size: int, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Turn an RGB image [height, width, 3] uint8 into normalised tiles [n, 3, tile_size, tile_size], row by row.

    Pillow's antialiased bicubic stretches the image over columns * rows tiles. If there are several tiles, the whole
    image follows as one more tile, the thumbnail. The caller chooses the grid, by `choose_grid`.
    `dtype` is float16, bfloat16 or float32. The result is on the image's device: a GPU (or the CPU with
    TRITON_INTERPRET=1). Raises ValueError for an image, a grid or a dtype that does not fit this description."""
    if image.dim() != 3 or image.shape[2] != 3 or image.dtype != torch.uint8 or not image.is_contiguous():
        raise ValueError(
            "tile_resample: image must be [height, width, 3] uint8 and contiguous; got "
            f"{list(image.shape)} {str(image.dtype).removeprefix('torch.')}"
        )
    height, width = image.shape[:2]
    if min(height, width, columns, rows, tile_size) < 1:
        raise ValueError(
            f"tile_resample: {width}x{height} pixels to {columns}x{rows} tiles of {tile_size}: all must be > 0"
        )
    if image.numel() >= 1 << 31:
        raise ValueError(f"tile_resample: {width}x{height} pixels are more than 31-bit offsets reach; shrink the image")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"tile_resample: dtype must be float16, bfloat16 or float32, not {dtype}")
    count = columns * rows + (columns * rows > 1)
    tiles = torch.empty((count, 3, tile_size, tile_size), dtype=dtype, device=image.device)
    plan = _plan_on(image.device, width, height, columns, rows, tile_size, BLOCK, SOURCE)
    planes, pitch = _planes(image)
    tile_resample_kernel[(3, triton.cdiv(tile_size, BLOCK) ** 2, count)](
        *(planes, *plan.first_pass, *plan.second_pass, plan.first_pass[1].shape[1], plan.second_pass[1].shape[1]),
        *(pitch, height * pitch, columns, rows, plan.tiles_vertical_first, plan.thumbnail_vertical_first, tiles),
        *_MEAN,
        *_STD,
        TILE=tile_size,
        BLOCK=BLOCK,
        SOURCE=SOURCE,
        ALIGN=_ALIGN,
        num_warps=WARPS,
        num_stages=1,
    )
    return tiles


def _planes(image: Tensor) -> tuple[Tensor, int]:
    """Split [height, width, 3] into channels: [3, height, pitch] uint8 and SOURCE bytes more; returns the pitch too."""
    height, width = image.shape[:2]
    if image.data_ptr() % 4:
        image = image.clone()
    pitch = triton.cdiv(width, _ALIGN) * _ALIGN
    planes = torch.empty(3 * height * pitch + SOURCE, dtype=torch.uint8, device=image.device)
    # The last word may reach up to three bytes beyond the image: torch's allocations are multiples of 512 bytes.
    words = triton.cdiv(image.numel(), 4)
    grid = (height, triton.cdiv(pitch, 4 * _QUADS))
    planes_kernel[grid](image, width, words, pitch, height * pitch, planes, QUADS=_QUADS, num_warps=4)
    return planes, pitch


class _DevicePlan(typing.NamedTuple):
    """Holds a ResizePlan as tables for blocks, (spans, weights), on the device."""

    first_pass: tuple[Tensor, Tensor]
    second_pass: tuple[Tensor, Tensor]
    tiles_vertical_first: int
    thumbnail_vertical_first: int


@functools.lru_cache(maxsize=32)  # a plan takes some megabytes
def _plan_on(
    device: torch.device, width: int, height: int, columns: int, rows: int, tile_size: int, block: int, source: int
) -> _DevicePlan:
    plan = resize_plan(width, height, columns, rows, tile_size)
    both = [block_tables(tables, tile_size, block, source, _ALIGN) for tables in (plan.first_pass, plan.second_pass)]
    first, second = (
        (torch.from_numpy(tables.spans).to(device), torch.from_numpy(tables.weights).to(device)) for tables in both
    )
    return _DevicePlan(first, second, plan.tiles_vertical_first, plan.thumbnail_vertical_first)
