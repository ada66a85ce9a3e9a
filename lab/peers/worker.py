"""Answers questions from outside of a peer's process: a line of JSON in, a line of JSON out.

The first line out is {"ready": "name and version"}. Questions and answers of a worker that decodes:

    {"prompt": [[id, ...], ...], "steps": n, "banned": id} -> {"seconds": s, "tokens": [[id, ...], ...]}

The seconds are the time of `steps` greedy decoding steps after the prompt; the first token of each row follows from the
prompt itself. Questions and answers of a worker that runs the whole path, see `Clock.answer`:

    {"image": a JPEG in base64, "question": text, "tokens": n} -> {"first_s": s, "total_s": s, "tokens": [id, ...], ...}
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

Answer = Callable[..., dict[str, Any]]  # takes the keys of a question as arguments


def serve(load: Callable[[], tuple[str, Answer]]) -> None:
    """Loads the model, then answers until stdin ends. Anything that `load` and the answers print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ready, answer = load()
    print(json.dumps({"ready": ready}, allow_nan=False), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line)), allow_nan=False), file=answers, flush=True)


class Clock:
    """Times one answer from the request on: `tick` at every token."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._ticks: list[float] = []

    def tick(self) -> None:
        self._ticks.append(time.perf_counter() - self._started)

    def answer(self, tokens: Sequence[int], prompt_tokens: int, image_tokens: int, **parts: float) -> dict[str, Any]:
        """Makes the answer of the whole path. `parts`: seconds of stages before the first token."""
        assert len(tokens) == len(self._ticks), f"{len(tokens)} tokens, {len(self._ticks)} ticks"
        return {
            "first_s": self._ticks[0],
            "total_s": self._ticks[-1],
            "tokens": list(tokens),
            "prompt_tokens": prompt_tokens,
            "image_tokens": image_tokens,
            "parts": parts,
        }
