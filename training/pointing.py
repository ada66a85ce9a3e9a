"""Says from which tokens each token of an answer is read: four attention heads learn to look there.

Reading small print takes two steps: finding the named string, then, letter by letter, the token of the next letter. A
loss on the answer alone rewards reading only if both steps work; a loss on where a head looks teaches each by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nvlm_trt.evaluation.tinydocs.kinds import Question
from nvlm_trt.evaluation.tinydocs.page import SHAPES
from training.labels import GRID, PLANES, Labels, code

# the heads look for: a letter in the left or the right column of an image token, a whole thing, a letter of the text
LEFT, RIGHT, WHOLE, TEXT = range(4)
TOKENS = (GRID // 2) ** 2  # of a tile

_PLANE = {name: number for number, name in enumerate(PLANES)}
_PROMPTS = [
    re.compile(pattern)
    for pattern in (
        r"What does the (?P<colour>\w+) text say\?",
        r"Which tile has the (?P<colour>\w+) text\?",
        r"What is the (?P<sum>sum)\?",
        r"What is the (?P<key>\w+)\?",
        r"Which line says (?P<word>\w+)\?",
        r"What colour is the (?P<kind>\w+)\?",
        r"What shape is (?P<shape_colour>\w+)\?",
        r"Where is the (?P<shape_colour>\w+) (?P<kind>\w+)\?",
        r"How many (?P<kind>\w+)s\?",
        r"How tall is the (?P<bar>\w+) bar\?",
        r"Which picture has a (?P<kind>\w+)\?",
    )
]


@dataclass(frozen=True)
class Point:
    """The tokens at which one head looks to say one token of the answer."""

    answer_token: int
    head: int
    # each of these is right. Image tokens have numbers that run through the question's tiles: tile * TOKENS + place in
    # the tile; for the head TEXT, the numbers are places in the question's tokens
    tokens: npt.NDArray[np.intp]


def text_points(question: Question, tokens_before: Callable[[str], int]) -> list[Point]:
    """Finds the letters of a text-only answer in its question; `tokens_before` counts the tokens of a prefix."""
    if question.task == "add":
        digits = [tokens_before(question.prompt[: match.start()]) for match in re.finditer(r"\d", question.prompt)]
        return [Point(number, TEXT, np.array([d])) for number in range(len(question.answer)) for d in digits]
    written = question.answer[::-1] if question.task == "reverse" else question.answer
    first = tokens_before(question.prompt[: question.prompt.index(f" {written}.") + 1])
    places = range(first, first + len(written))
    ordered = reversed(places) if question.task == "reverse" else places
    return [Point(number, TEXT, np.array([place])) for number, place in enumerate(ordered)]


def points(question: Question, labels: Labels) -> list[Point]:
    """Finds an answer's image tokens in the labels of the question's images [tiles, GRID, GRID, planes]."""
    asked = next(match for pattern in _PROMPTS if (match := pattern.fullmatch(question.prompt))).groupdict()
    meant = _meant(asked, labels)
    if not meant.any():
        return []
    tile, row, column = np.nonzero(meant)
    token = tile * TOKENS + row // 2 * (GRID // 2) + column // 2
    index = labels[tile, row, column, _PLANE["index"]]
    if question.task == "sum":  # both digits at once, before and after the plus
        digits = [np.unique(token[index == place]) for place in (0, 2)]
        return [Point(number, WHOLE, digit) for number in range(len(question.answer)) for digit in digits]
    if question.task not in ("ocr", "form"):
        return [Point(0, WHOLE, np.unique(token))]
    blank = _blank_tokens(labels)
    found = []
    for number in range(len(question.answer) + 1):  # + 1: the answer ends where no letter is found
        for head in (LEFT, RIGHT):
            holds = np.unique(token[(index == number) & (column % 2 == head)])
            found.append(Point(number, head, holds if len(holds) else blank))
    return found


def _meant(asked: dict[str, str | None], labels: Labels) -> npt.NDArray[np.bool_]:
    """Marks the patches that show the named thing [tiles, GRID, GRID]."""

    def shows(plane: str, value: object) -> npt.NDArray[np.bool_]:
        return labels[..., _PLANE[plane]] == code(plane, value)

    glyph = shows("kind", "glyph")
    if asked.get("colour"):
        return glyph & shows("colour", asked["colour"])
    if asked.get("sum"):
        plus = glyph & shows("character", "+")
        return glyph & np.isin(labels[..., _PLANE["colour"]], labels[plus][:, _PLANE["colour"]])
    if asked.get("key"):
        return glyph & shows("word", asked["key"])
    if asked.get("word"):
        return shows("kind", "word") & shows("word", asked["word"])
    if asked.get("bar"):
        return shows("kind", "bar") & shows("colour", asked["bar"])
    meant = np.isin(labels[..., _PLANE["kind"]], [code("kind", shape) for shape in SHAPES])
    if asked.get("kind"):
        meant &= shows("kind", asked["kind"])
    if asked.get("shape_colour"):
        meant &= shows("colour", asked["shape_colour"])
    return meant


def _blank_tokens(labels: Labels) -> npt.NDArray[np.intp]:
    half = GRID // 2
    shown = (labels[..., _PLANE["kind"]] > 0).reshape(len(labels), half, 2, half, 2).any((2, 4))
    return np.flatnonzero(~shown)
