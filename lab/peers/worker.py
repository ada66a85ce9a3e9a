"""How a peer is asked from outside of its environment: a line of JSON in, a line of JSON out.

    {"prompt": [[id, ...], ...], "steps": n, "banned": id} -> {"seconds": s, "tokens": [[id, ...], ...]}

The seconds are those of `steps` greedy decoding steps after the prompt; of the tokens, the first follows from the
prompt. The first line out is {"ready": "name and version"}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Decode = Callable[[list[list[int]], int, int], dict[str, Any]]


def serve(load: Callable[[], tuple[str, Decode]]) -> None:
    """`load` and `decode` may print what they like: it goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ready, decode = load()
    print(json.dumps({"ready": ready}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(decode(asked["prompt"], asked["steps"], asked["banned"])), file=answers, flush=True)
