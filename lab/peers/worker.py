"""Answers questions from outside of a peer's environment: a line of JSON in, a line of JSON out.

    {"prompt": [[id, ...], ...], "steps": n, "banned": id} -> {"seconds": s, "tokens": [[id, ...], ...]}

The seconds are the time of `steps` greedy decoding steps after the prompt; the first token of each row follows from the
prompt itself. The first line out is {"ready": "name and version"}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Decode = Callable[[list[list[int]], int, int], dict[str, Any]]


def serve(load: Callable[[], tuple[str, Decode]]) -> None:
    """Loads the model, then answers until stdin ends. Anything that `load` and `decode` print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ready, decode = load()
    print(json.dumps({"ready": ready}, allow_nan=False), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(
            json.dumps(decode(asked["prompt"], asked["steps"], asked["banned"]), allow_nan=False),
            file=answers,
            flush=True,
        )
