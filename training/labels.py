"""Labels each patch of a tile with what the patch shows: these labels train the vision encoder."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nvlm_trt.evaluation.tinydocs.kinds import KEYS, MAX_HEIGHT, PLACES, WORDS
from nvlm_trt.evaluation.tinydocs.page import COLOURS, SHAPES, TILE, Mark, Page
from nvlm_trt.evaluation.tinydocs.writing import CODE_CHARACTERS

PATCH = 7
GRID = TILE // PATCH  # patches along a tile's edge
IGNORE = -1

_VALUES: dict[str, tuple[object, ...]] = {
    "kind": ("none", "glyph", "word", *SHAPES, "bar", "blur"),  # blur: text too small to read, in a thumbnail
    "colour": (None, *COLOURS),
    "character": (*CODE_CHARACTERS, "+", "=", "."),
    "index": tuple(range(6)),
    "word": (None, *KEYS, *WORDS),
    "line": (1, 2, 3, 4),
    "number": tuple(range(1, MAX_HEIGHT + 1)),
    "place": PLACES,
    "previous": ("", *CODE_CHARACTERS, "+", "=", "."),
}
PLANES: dict[str, int] = {name: len(values) for name, values in _VALUES.items()}
_CODES = {name: {value: code for code, value in enumerate(values)} for name, values in _VALUES.items()}

# kind -> the planes that describe it; the loss ignores the other planes
_TOLD = {
    "glyph": ("colour", "character", "index", "word", "previous"),
    "word": ("word", "line"),
    **dict.fromkeys(SHAPES, ("colour", "number", "place")),
    "bar": ("colour", "number"),
    "blur": ("colour",),
}

Labels = npt.NDArray[np.int8]


def values(plane: str) -> tuple[object, ...]:
    """Returns the value of each class of a plane."""
    return _VALUES[plane]


def code(plane: str, value: object) -> int:
    """Returns the class of a plane that stands for a value."""
    return _CODES[plane][value]


def page_labels(page: Page) -> Labels:
    """Labels a page -> [tiles, GRID, GRID, planes], in the order of `tile_image`, thumbnail last.

    Small print is read in the tiles and figures in the thumbnail; a page of one tile shows both in it.
    """
    tiles = page.columns * page.rows
    labels = np.full((tiles + (tiles > 1), GRID, GRID, len(PLANES)), IGNORE, np.int8)
    labels[..., 0] = 0
    for mark in page.marks:
        is_text = mark.kind in ("glyph", "word")
        if is_text or tiles == 1:
            _put(labels[page.tile_of(mark)], mark.x % TILE, mark.y % TILE, mark.kind, mark)
        if tiles > 1:
            kind = "blur" if is_text else mark.kind
            _put(labels[-1], mark.x / page.columns, mark.y / page.rows, kind, mark)
    return labels


def _put(tile: Labels, x: float, y: float, kind: str, mark: Mark) -> None:
    patch = tile[min(int(y // PATCH), GRID - 1), min(int(x // PATCH), GRID - 1)]
    patch[:] = IGNORE
    patch[0] = _CODES["kind"][kind]
    for number, name in enumerate(PLANES):
        value = getattr(mark, name) if name in _TOLD[kind] else None
        if name in _TOLD[kind] and (value is not None or None in _CODES[name]):
            patch[number] = _CODES[name][value]
