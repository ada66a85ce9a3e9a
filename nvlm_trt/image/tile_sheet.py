"""Draws an image and the tiles that the model gets of it on one sheet: image, tiles row by row, thumbnail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from nvlm_trt.bounds import MAX_TILES
from nvlm_trt.errors import RequestError
from nvlm_trt.image.tiling import choose_grid, tile_image, tile_pixels
from nvlm_trt.prompt.tokenizer import tile_tags

Box = tuple[int, int, int, int]  # left, top, right, bottom, as Pillow has them
Size = tuple[int, int]  # width, height

# As many pixels as an image may have; normalised, at 12 bytes each, they take 768 MB.
_MAX_PIXELS = 64_000_000

# Three times the 56 px of the tiny models shows single pixels and has room for the longest tag in 13 px.
_LEAST_TILE_EDGE = 168
_LEAST_TEXT = 13
_WANTED_ASPECT = 1.5  # decides between two arrangements of the panels

_BACKGROUND = (236, 237, 239)
_FRAME = (184, 187, 192)
_TEXT = (38, 42, 48)
_CAPTION = (96, 101, 109)


@dataclass(frozen=True)
class SheetLayout:
    """Places of everything on a sheet. `tile_boxes` and `tags` are in the model's order, thumbnail last."""

    grid: tuple[int, int]  # columns, rows
    tags: tuple[str, ...]
    heading: str
    image_caption: str
    size: Size
    image_box: Box
    tile_boxes: tuple[Box, ...]
    margin: int
    text_size: int

    @property
    def heading_size(self) -> int:
        return round(1.5 * self.text_size)

    @property
    def caption_height(self) -> int:
        return _caption_height(self.text_size)


def layout_sheet(image_size: Size, tile_size: int, max_tiles: int) -> SheetLayout:
    """Places everything on the sheet of an image of `image_size`. Draws nothing.

    Raises RequestError for a sheet that is too large to draw, before anything is allocated."""
    _check_numbers(tile_size, max_tiles)
    columns, rows = choose_grid(*image_size, tile_size, max_tiles)
    regular = columns * rows
    tags = tuple(tile_tags(regular + (regular > 1)))
    _check_pixels(len(tags), tile_size)

    edge = tile_size * -(
        -_LEAST_TILE_EDGE // tile_size
    )  # a whole multiple, so that nearest neighbour makes equal squares
    text_size = max(_LEAST_TEXT, edge // 18)
    gap, caption = max(8, edge // 28), _caption_height(text_size)
    margin = 2 * gap
    heading = _heading(columns, rows, tile_size)
    image_caption = f"image, {image_size[0]} x {image_size[1]} px"
    shown = _shown_size(image_size, edge)

    panels = [  # width, height of the image, the tiles and the thumbnail, each with its caption
        (max(shown[0], _text_width(image_caption, text_size)), caption + shown[1]),
        (columns * (edge + gap) - gap, rows * (caption + edge + gap) - gap),
    ]
    if regular > 1:
        panels.append((edge, caption + edge))
    corners, (width, height) = _arrange(panels, 4 * gap)
    left, top = margin, margin + _caption_height(round(1.5 * text_size)) + gap

    def box(panel: int, across: int, down: int, size: Size) -> Box:
        x, y = left + corners[panel][0] + across, top + corners[panel][1] + down + caption
        return x, y, x + size[0], y + size[1]

    step_across, step_down = edge + gap, caption + edge + gap
    tiles = [box(1, i * step_across, j * step_down, (edge, edge)) for j in range(rows) for i in range(columns)]
    if regular > 1:
        tiles.append(box(2, 0, 0, (edge, edge)))
    return SheetLayout(
        grid=(columns, rows),
        tags=tags,
        heading=heading,
        image_caption=image_caption,
        size=(left + max(width, _text_width(heading, round(1.5 * text_size))) + margin, top + height + margin),
        image_box=box(0, 0, 0, shown),
        tile_boxes=tuple(tiles),
        margin=margin,
        text_size=text_size,
    )


def draw_tile_sheet(image: Image.Image, tile_size: int, max_tiles: int) -> Image.Image:
    """RGB image -> RGB sheet. Shows the tiles that the encoder sees: they come from `tile_image` and its inverse.

    Raises what `layout_sheet` raises."""
    layout = layout_sheet(image.size, tile_size, max_tiles)
    sheet = Image.new("RGB", layout.size, _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((layout.margin, layout.margin), layout.heading, _TEXT, ImageFont.load_default(layout.heading_size))

    left, top, right, bottom = layout.image_box
    shown_size = (right - left, bottom - top)
    enlarged = shown_size[0] > image.width
    resample = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    _place(sheet, image.resize(shown_size, resample), layout.image_box, layout.image_caption, layout)
    tiles = tile_pixels(tile_image(image, tile_size, max_tiles))  # [tiles, E, E, 3]
    for tile, box, tag in zip(tiles, layout.tile_boxes, layout.tags, strict=True):
        edge = box[2] - box[0]
        drawn = Image.fromarray(tile).resize((edge, edge), Image.Resampling.NEAREST)
        _place(sheet, drawn, box, tag, layout)
    return sheet


def _place(sheet: Image.Image, image: Image.Image, box: Box, caption: str, layout: SheetLayout) -> None:
    """Draws an image, its caption above it, and a frame outside its edges, so that every pixel stays visible."""
    draw = ImageDraw.Draw(sheet)
    left, top, right, bottom = box
    draw.rectangle((left - 1, top - 1, right, bottom), outline=_FRAME)
    sheet.paste(image, (left, top))
    draw.text((left, top - layout.caption_height), caption, _CAPTION, ImageFont.load_default(layout.text_size))


def _arrange(panels: Sequence[Size], apart: int) -> tuple[list[Size], Size]:
    """Puts panels side by side or one below the other -> their top left corners and the size of all."""

    def total(axis: int) -> int:
        return sum(panel[axis] for panel in panels) + apart * (len(panels) - 1)

    across = (total(0), max(height for _, height in panels))
    down = (max(width for width, _ in panels), total(1))
    size = min(across, down, key=lambda size: abs(math.log(size[0] / size[1] / _WANTED_ASPECT)))
    corners, at = [], 0
    for width, height in panels:
        corners.append((at, 0) if size is across else (0, at))
        at += apart + (width if size is across else height)
    return corners, size


def _shown_size(image_size: Size, edge: int) -> Size:
    """Reduces an image that is larger than two tiles, enlarges one that is smaller than half a tile, keeps others."""
    width, height = image_size
    longest = max(image_size)
    if longest > 2 * edge:
        return max(1, round(width * 2 * edge / longest)), max(1, round(height * 2 * edge / longest))
    times = max(1, edge // longest)
    return width * times, height * times


def _heading(columns: int, rows: int, tile_size: int) -> str:
    regular = columns * rows
    if regular == 1:
        return f"1 x 1 grid, 1 tile of {tile_size} px, which is the thumbnail"
    return f"{columns} x {rows} grid, {regular} tiles of {tile_size} px + thumbnail"


def _caption_height(text_size: int) -> int:
    return round(1.5 * text_size)


def _text_width(text: str, text_size: int) -> int:
    return math.ceil(ImageFont.load_default(text_size).getlength(text))


def _check_numbers(tile_size: int, max_tiles: int) -> None:
    if tile_size < 1:
        raise RequestError(f"tile_size {tile_size} must be at least 1; NVLM-1.0 has 448")
    if not 1 <= max_tiles <= MAX_TILES:
        raise RequestError(f"max_tiles {max_tiles} must be from 1 to {MAX_TILES}; NVLM-1.0 has 6")


def _check_pixels(tiles: int, tile_size: int) -> None:
    if tiles * tile_size**2 > _MAX_PIXELS:
        raise RequestError(
            f"{tiles} tiles of {tile_size} px are more than the {_MAX_PIXELS} pixels that are drawn; "
            "lower the tile size or the number of tiles"
        )
