"""Writes text on a page: chooses the text, a free place and a size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import numpy as np

from nvlm_trt.evaluation.tinydocs.page import TILE, Page

T = TypeVar("T")
Grid = tuple[int, int]  # columns, rows

# without I O Q D (like 1 and 0), B (8), S (5), Z (2), J: fonts draw these alike, and licence keys omit them, too
CODE_CHARACTERS = "0123456789ACEFGHKLMNPRTUVWXY"


def random_code(random: np.random.Generator, shortest: int = 4, longest: int = 6) -> str:
    length = int(random.integers(shortest, longest + 1))
    return "".join(random.choice(list(CODE_CHARACTERS), length))


def random_value(random: np.random.Generator) -> str:
    """Makes a form's value: an amount, a number or a code."""
    kind = random.integers(3)
    if kind == 0:
        return f"{random.integers(1, 100)}.{random.integers(0, 100):02}"
    if kind == 1:
        return str(random.integers(100, 100_000))
    return random_code(random, 3, 5)


def choose(random: np.random.Generator, grids: dict[Grid, float]) -> Grid:
    weights = np.array(list(grids.values()))
    return list(grids)[random.choice(len(grids), p=weights / weights.sum())]


def pick(random: np.random.Generator, items: Iterable[T], count: int) -> list[T]:
    """Picks `count` different items in random order."""
    pool = list(items)
    return [pool[i] for i in random.permutation(len(pool))[:count]]


def text_lines(random: np.random.Generator, page: Page, count: int) -> list[tuple[float, float]]:
    """Picks `count` different lines, three of which fit in a tile. Returns (tile's left edge, centre y) of each."""
    tiles = page.columns * page.rows
    places = []
    for line in pick(random, range(3 * tiles), count):
        tile, row = divmod(line, 3)
        x, y = tile % page.columns * TILE, tile // page.columns * TILE + 18.5 * row + random.uniform(8, 10.5)
        places.append((float(x), float(y)))
    return places


def write(
    random: np.random.Generator, page: Page, text: str, left: float, y: float, colour: str | None, **facts: object
) -> None:
    """Writes a line of small print somewhere in the tile whose left edge is `left`."""
    size, width = page.fit(text, random.uniform(11.5, 13.5), TILE - 3)
    page.text(text, left + 1 + random.uniform(0, max(0.0, TILE - 2 - width)), y, size, colour, **facts)


_CASES = (str.upper, str.title, str.lower)


def write_word(random: np.random.Generator, page: Page, x: float, y: float, word: str, **facts: object) -> None:
    text = _CASES[random.integers(3)](word)
    tile_left = x // TILE * TILE
    size, width = page.fit(text, random.uniform(10.5, 12), TILE - 2)
    x = min(x, tile_left + TILE - 1 - width)
    page.text(text, x, y, size, None, kind="word", character=None, index=None, previous=None, word=word, **facts)
