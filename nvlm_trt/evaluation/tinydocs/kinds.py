"""Draws the kinds of page, each with the questions that it answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nvlm_trt.evaluation.tinydocs.page import COLOURS, SHAPES, TILE, Page
from nvlm_trt.evaluation.tinydocs.writing import (
    Grid,
    choose,
    pick,
    random_code,
    random_value,
    text_lines,
    write,
    write_word,
)

KEYS = ("total", "tax", "date", "name", "code", "item", "cash", "order")
WORDS = (
    "milk", "bread", "soap", "rice", "tea", "salt", "eggs", "corn",
    "fish", "meat", "plum", "pear", "lime", "kale", "bean", "jam",
)  # fmt: skip
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
MAX_HEIGHT = 8  # for the bars of a chart

# every grid of at most 6 tiles that the tiling rule can choose, long ones rarer
_TEXT_GRIDS: dict[Grid, float] = {
    (2, 1): 3, (1, 2): 3, (3, 1): 2, (1, 3): 2, (2, 2): 4, (4, 1): 1, (1, 4): 1,
    (5, 1): 0.5, (1, 5): 0.5, (3, 2): 3, (2, 3): 3, (6, 1): 0.5, (1, 6): 0.5,
}  # fmt: skip
_LIST_GRIDS: dict[Grid, float] = {(1, 1): 2, (2, 1): 3, (3, 1): 2, (4, 1): 1, (5, 1): 0.5, (6, 1): 0.5}
_FIGURE_GRIDS: dict[Grid, float] = {(1, 1): 3, (2, 2): 2, (3, 2): 1, (2, 3): 1}


@dataclass(frozen=True)
class Question:
    """Holds one question about the pages that are returned with it."""

    task: str
    prompt: str
    answer: str


Drawing = tuple[list[Page], list[Question]]


def draw_codes(random: np.random.Generator, font: str) -> Drawing:
    """Draws codes in small print, each in its own colour."""
    columns, rows = choose(random, _TEXT_GRIDS)
    page = Page(columns, rows, font, random)
    texts = int(random.choice([1, 2, 3], p=[0.3, 0.4, 0.3]))
    return [page], _write_codes(random, page, text_lines(random, page, texts), pick(random, COLOURS, texts))


def _write_codes(
    random: np.random.Generator, page: Page, lines: Sequence[tuple[float, float]], colours: Sequence[str]
) -> list[Question]:
    """Writes a code on each line."""
    questions = []
    for (x, y), colour in zip(lines, colours, strict=True):
        code = random_code(random)
        write(random, page, code, x, y, colour)
        questions.append(Question("ocr", f"What does the {colour} text say?", code))
    return questions


def draw_places(random: np.random.Generator, font: str) -> Drawing:
    """Draws codes as `draw_codes` does; asks for the number of a code's tile, which only the tile's tag tells."""
    (page,), _ = draw_codes(random, font)
    tiles = {mark.colour: page.tile_of(mark) + 1 for mark in page.marks}
    return [page], [Question("tile", f"Which tile has the {colour} text?", str(tile)) for colour, tile in tiles.items()]


def draw_sum(random: np.random.Generator, font: str) -> Drawing:
    """Draws a sum of two digits, and often a code to be ignored."""
    columns, rows = choose(random, _TEXT_GRIDS)
    page = Page(columns, rows, font, random)
    lines = text_lines(random, page, int(random.integers(1, 3)))
    colours = pick(random, COLOURS, len(lines))
    a, b = random.integers(0, 10, 2)
    write(random, page, f"{a}+{b}=", *lines[0], colours[0])
    asked = Question("sum", "What is the sum?", str(a + b))
    return [page], [asked, *_write_codes(random, page, lines[1:], colours[1:])]


def draw_form(random: np.random.Generator, font: str) -> Drawing:
    """Draws pairs of key and value, the value under its key, one pair in a tile."""
    columns, rows = choose(random, _TEXT_GRIDS)
    page = Page(columns, rows, font, random)
    pairs = min(columns * rows, int(random.integers(1, 5)))
    questions = []
    for tile, key in zip(pick(random, range(columns * rows), pairs), pick(random, KEYS, pairs), strict=True):
        left, top = tile % columns * TILE, tile // columns * TILE
        value = random_value(random)
        y = top + random.uniform(10, 26)
        write_word(random, page, left + random.uniform(1, 8), y, key)
        write(random, page, value, left, y + random.uniform(16.5, 19), None, word=key)
        questions.append(Question("form", f"What is the {key}?", value))
    return [page], questions


def draw_list(random: np.random.Generator, font: str) -> Drawing:
    """Draws words on two to four lines that run across the page, a word or none in each tile of a line."""
    columns, _ = choose(random, _LIST_GRIDS)
    page = Page(columns, 1, font, random)
    lines = int(random.integers(2, 5))
    pitch, top = 14.0, random.uniform(0, 2)  # lines begin at the top, so that a tile alone shows which line is which
    places = [(column, line) for line in range(lines) for column in range(columns)]
    first = [(int(random.integers(columns)), line) for line in range(lines)]  # no line is empty
    rest = [place for place in pick(random, places, len(places)) if place not in first]
    words = pick(random, WORDS, min(len(WORDS), lines + int(random.integers(0, len(rest) + 1))))
    questions = []
    for (column, line), word in zip((*first, *rest), words, strict=False):
        y = top + pitch * (line + 0.5) + random.uniform(-1.5, 0)
        write_word(random, page, column * TILE + random.uniform(0.5, 9), y, word, line=line + 1)
        questions.append(Question("line", f"Which line says {word}?", str(line + 1)))
    return [page], questions


def draw_shapes(random: np.random.Generator, font: str, grids: dict[Grid, float] | None = None) -> Drawing:
    """Draws one to five shapes, large enough for the thumbnail, each in a cell of 3 x 3."""
    columns, rows = choose(random, grids or _FIGURE_GRIDS)
    page = Page(columns, rows, font, random)
    kinds = _shape_kinds(random)
    colours = [str(colour) for colour in random.choice(list(COLOURS), len(kinds))]
    counts = Counter(kinds)
    width, height = page.width / 3, page.height / 3
    for kind, colour, cell in zip(kinds, colours, pick(random, range(9), len(kinds)), strict=True):
        radius = min(width, height) * random.uniform(0.32, 0.45)
        x = (cell % 3 + 0.5) * width + random.uniform(-0.05, 0.05) * width
        y = (cell // 3 + 0.5) * height + random.uniform(-0.05, 0.05) * height
        page.shape(kind, x, y, radius, colour, number=counts[kind], place=PLACES[cell])
    return [page], _shape_questions(page)


def _shape_kinds(random: np.random.Generator) -> list[str]:
    """Repeats one kind on half of the pages, for counting; mixes kinds on the other pages."""
    total = int(random.integers(1, 6))
    if random.random() < 0.5:
        kind, *others = pick(random, SHAPES, len(SHAPES))
        repeated = int(random.integers(1, total + 1))
        return [kind] * repeated + [str(k) for k in random.choice(others, total - repeated)]
    return [str(kind) for kind in random.choice(SHAPES, total)]


def _shape_questions(page: Page) -> list[Question]:
    kinds = Counter(mark.kind for mark in page.marks)
    colours = Counter(mark.colour for mark in page.marks)
    pairs = Counter((mark.kind, mark.colour) for mark in page.marks)
    questions = [Question("count", f"How many {kind}s?", str(count)) for kind, count in kinds.items()]
    for mark in page.marks:
        if kinds[mark.kind] == 1:
            questions.append(Question("colour", f"What colour is the {mark.kind}?", str(mark.colour)))
        if colours[mark.colour] == 1:
            questions.append(Question("shape", f"What shape is {mark.colour}?", mark.kind))
        if pairs[mark.kind, mark.colour] == 1:
            questions.append(Question("location", f"Where is the {mark.colour} {mark.kind}?", str(mark.place)))
    return questions


def draw_chart(random: np.random.Generator, font: str) -> Drawing:
    """Draws three to five bars on a scale of eight, with a baseline and sometimes rules."""
    columns, rows = choose(random, _FIGURE_GRIDS)
    page = Page(columns, rows, font, random)
    bars = int(random.integers(3, 6))
    base, unit = page.height * 0.93, page.height * 0.105
    if random.random() < 0.5:
        for height in range(2, MAX_HEIGHT + 1, 2):
            page.rule(0, base - height * unit, page.width, (205, 205, 205))
    questions = []
    for index, colour in enumerate(pick(random, COLOURS, bars)):
        height = int(random.integers(1, MAX_HEIGHT + 1))
        centre, half = (index + 0.5) * page.width / bars, page.width / bars * random.uniform(0.28, 0.4)
        page.bar(centre - half, base - height * unit, centre + half, base, colour, height)
        questions.append(Question("chart", f"How tall is the {colour} bar?", str(height)))
    page.rule(0, base, page.width, (60, 60, 60))
    return [page], questions


def draw_pair(random: np.random.Generator, font: str) -> Drawing:
    """Draws two one-tile images of shapes; asks which of them holds a shape that the other lacks."""
    drawn = [draw_shapes(random, font, {(1, 1): 1})[0][0] for _ in range(2)]
    kinds = [{mark.kind for mark in page.marks} for page in drawn]
    questions = []
    for answer, own, other in (("first", kinds[0], kinds[1]), ("second", kinds[1], kinds[0])):
        for kind in sorted(own - other):
            # the shipped checkpoints are trained on this wording
            questions.append(Question("pair", f"Which picture has a {kind}?", answer))
    return drawn, questions
