"""TinyDocs: images of small documents with questions whose answers can be checked, drawn from a seed.

A sample depends on its split, task and index alone. Splits differ in seed and in fonts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from nvlm_trt.errors import RequestError
from nvlm_trt.evaluation.samples import Sample
from nvlm_trt.evaluation.tinydocs import kinds, texts
from nvlm_trt.evaluation.tinydocs.fonts import FONTS, SPLITS, Split
from nvlm_trt.evaluation.tinydocs.kinds import Drawing, Question
from nvlm_trt.extras import require

__all__ = ["FONTS", "SPLITS", "TASKS", "TEXT_TASKS", "Split", "draw", "generate"]

_PAGES: dict[str, Callable[[np.random.Generator, str], Drawing]] = {
    "ocr": kinds.draw_codes,
    "form": kinds.draw_form,
    "line": kinds.draw_list,
    "sum": kinds.draw_sum,
    "colour": kinds.draw_shapes,
    "shape": kinds.draw_shapes,
    "count": kinds.draw_shapes,
    "location": kinds.draw_shapes,
    "chart": kinds.draw_chart,
    "pair": kinds.draw_pair,
    "tile": kinds.draw_places,
}
# never scored: only tile tags tell which tile is "tile 3", and NVLM-H cannot tell the tile of small print
_PROBES = ("tile",)
_TEXTS: dict[str, Callable[[np.random.Generator], Question]] = {
    "copy": texts.ask_copy,
    "reverse": texts.ask_reverse,
    "add": texts.ask_add,
}
TASKS: tuple[str, ...] = tuple(task for task in _PAGES if task not in _PROBES)
TEXT_TASKS: tuple[str, ...] = tuple(_TEXTS)


def generate(split: Split, tasks: Sequence[str] = (*TASKS, *TEXT_TASKS), count: int = 200) -> Iterator[Sample]:
    """Yields `count` samples of each task, images as PNG. Raises RequestError for an unknown split or task,
    NvlmError without the fonts."""
    if split not in SPLITS:
        raise RequestError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    for task in tasks:
        if task not in _PAGES and task not in _TEXTS:
            raise RequestError(f"task {task!r} is not one of {', '.join((*TASKS, *TEXT_TASKS))}")
    require("eval", "drawing documents")
    for task in tasks:
        for index in range(count):
            yield _sample(split, task, index)


def draw(split: Split, task: str, random: np.random.Generator) -> Drawing:
    """Draws a page for `task`, with noise. Returns the page (two for `pair`) and all questions that it can answer."""
    pages, questions = _PAGES[task](random, str(random.choice(FONTS[split])))
    for page in pages:
        page.add_noise()
    return pages, questions


def ask(task: str, random: np.random.Generator) -> Question:
    """Makes a question of a text-only task."""
    return _TEXTS[task](random)


def _sample(split: Split, task: str, index: int) -> Sample:
    name = f"{split}-{task}-{index:04}"
    number = (*TASKS, *TEXT_TASKS, *_PROBES).index(task)
    random = np.random.default_rng([SPLITS.index(split), number, index])
    if task in _TEXTS:
        question = ask(task, random)
        return Sample(name, task, question.prompt, question.answer)
    while True:
        pages, questions = draw(split, task, random)
        fitting = [question for question in questions if question.task == task]
        if fitting:
            question = fitting[random.integers(len(fitting))]
            return Sample(name, task, question.prompt, question.answer, tuple(page.png() for page in pages))
