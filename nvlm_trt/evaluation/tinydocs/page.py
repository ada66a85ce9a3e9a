"""Draws pages: a page is a Pillow canvas over a grid of tiles, with a record of everything drawn on the canvas.

Positions are in tile pixels: a page of `columns` x `rows` tiles is columns * TILE wide, whatever its image's size.
The record (`Mark`s) gives the questions, and can train a vision encoder.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nvlm_trt.evaluation.tinydocs.fonts import load_font
from nvlm_trt.image.tiling import choose_grid

TILE = 56  # pixels of the tiny models' tiles; larger models see the same pages larger
MAX_TILES = 6
COLOURS = {
    "red": (215, 30, 30),
    "green": (15, 140, 40),
    "blue": (30, 60, 220),
    "orange": (235, 135, 0),
    "purple": (145, 35, 170),
}
INK = (25, 25, 25)  # text that has no colour of its own
SHAPES = ("circle", "square", "triangle", "star")
MIN_ADVANCE = 7.3  # tile pixels from one glyph to the next: a patch of 7 never holds the centres of two


@dataclass(frozen=True)
class Mark:
    """Records one thing drawn. Fields that do not apply are None."""

    kind: str  # glyph, word, a shape, bar
    x: float  # centre, tile pixels
    y: float
    colour: str | None = None
    character: str | None = None  # glyph of a code, value or sum
    index: int | None = None  # the glyph's place there, from 0
    previous: str | None = None  # the character before it, "" before the first
    word: str | None = None  # a form's key (also on its value), a list's word
    line: int | None = None  # a list's line, from 1
    number: int | None = None  # shape: how many of its kind the page has; bar: its height
    place: str | None = None  # shape: one of PLACES


@dataclass
class Page:
    """Draws one image, `columns` x `rows` tiles. `generator` decides size, tint and noise."""

    columns: int
    rows: int
    font: str
    generator: np.random.Generator
    marks: list[Mark] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.width, self.height = self.columns * TILE, self.rows * TILE
        pixels = self.choose_size()
        self._scale = (pixels[0] / self.width, pixels[1] / self.height)
        self.tint = tuple(int(value) for value in self.generator.integers(232, 256, 3))
        self.image = Image.new("RGB", pixels, self.tint)
        self._pen = ImageDraw.Draw(self.image)

    def choose_size(self) -> tuple[int, int]:
        """Chooses the image's pixels: 0.95 to 1.7 times the tiles', aspect up to 15 % off, tiled into the same grid."""
        for _ in range(20):
            scale, skew = self.generator.uniform(0.95, 1.7), self.generator.uniform(0.93, 1.07)
            width, height = round(self.width * scale * skew), round(self.height * scale / skew)
            if choose_grid(width, height, TILE, MAX_TILES) == (self.columns, self.rows):
                return width, height
        return self.width, self.height

    def tile_of(self, mark: Mark) -> int:
        """Returns the number, from 0, of the tile that holds a mark's centre."""
        return int(mark.y // TILE) * self.columns + int(mark.x // TILE)

    def text(self, text: str, x: float, y: float, size: float, colour: str | None = None, **facts: object) -> None:
        """Draws `text` from the left edge x, centred on y, glyph by glyph; `facts` go into every glyph's mark.

        Letters become `glyph` marks with their index, or `word` marks where the facts name a word."""
        font, scale = self._font(size)
        x_scale, y_scale = self._scale
        for index, character in enumerate(text):
            advance = self.advance(character, size)
            centre = x + advance / 2
            fill = COLOURS[colour] if colour else INK
            self._pen.text((centre * x_scale, y * y_scale + 0.36 * size * scale), character, fill, font, anchor="ms")
            mark = Mark("glyph", centre, y, colour, character, index, text[index - 1 : index])
            self.marks.append(replace(mark, **facts))  # type: ignore[arg-type]
            x += advance

    def advance(self, character: str, size: float) -> float:
        """Returns the tile pixels from this glyph's left edge to the next glyph's."""
        font, scale = self._font(size)
        return max(font.getlength(character) / scale, MIN_ADVANCE)

    def fit(self, text: str, size: float, width: float) -> tuple[float, float]:
        """Returns the largest size up to `size` at which text fits in `width` tile pixels, and the text's width."""
        while True:
            length = sum(self.advance(character, size) for character in text)
            if length <= width or size <= 9:
                return size, length
            size -= 0.5

    def _font(self, size: float) -> tuple[ImageFont.FreeTypeFont, float]:
        """Returns the font at `size` tile pixels, and the image's pixels in one tile pixel."""
        scale = min(self._scale)
        return load_font(self.font, round(size * scale * 2) / 2), scale

    def shape(self, shape: str, x: float, y: float, radius: float, colour: str, **facts: object) -> None:
        x_scale, y_scale = self._scale
        points = [((x + radius * dx) * x_scale, (y + radius * dy) * y_scale) for dx, dy in _OUTLINES[shape]]
        self._pen.polygon(points, fill=COLOURS[colour])
        self.marks.append(replace(Mark(shape, x, y, colour), **facts))  # type: ignore[arg-type]

    def bar(self, left: float, top: float, right: float, bottom: float, colour: str, height: int) -> None:
        self._rectangle(left, top, right, bottom, COLOURS[colour])
        self.marks.append(Mark("bar", (left + right) / 2, top, colour, number=height))

    def rule(self, left: float, y: float, right: float, fill: tuple[int, int, int]) -> None:
        """Draws a thin horizontal line."""
        self._rectangle(left, y - 0.4, right, y + 0.4, fill)

    def _rectangle(self, left: float, top: float, right: float, bottom: float, fill: tuple[int, ...]) -> None:
        x_scale, y_scale = self._scale
        self._pen.rectangle((left * x_scale, top * y_scale, right * x_scale, bottom * y_scale), fill=fill)

    def add_noise(self) -> None:
        """Adds Gaussian noise of at most 7 levels, as a scanner does; leaves a third of the pages clean."""
        strength = max(0.0, self.generator.uniform(-3.5, 7))
        if strength:
            pixels = np.asarray(self.image, np.float32)
            noise = self.generator.standard_normal(pixels.shape[:2], np.float32)[..., None] * strength
            self.image = Image.fromarray(np.clip(pixels + noise + 0.5, 0, 255).astype(np.uint8))

    def png(self) -> bytes:
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG")
        return buffer.getvalue()


def _regular(corners: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """Returns corners around the unit circle from the top, every second one at radius `inner`."""
    turns = [2 * math.pi * k / corners for k in range(corners)]
    radii = [1.0 if k % 2 == 0 else inner for k in range(corners)]
    return [(r * math.sin(t), -r * math.cos(t)) for r, t in zip(radii, turns, strict=True)]


_OUTLINES = {
    "circle": _regular(40),
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (0.98, 0.8), (-0.98, 0.8)],
    "star": _regular(10, inner=0.42),
}
