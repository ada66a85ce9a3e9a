"""Reads JSON without what Python adds to it: NaN and infinity, also as a number beyond float's range."""

from __future__ import annotations

import json
import math
from typing import Any


def loads(text: str | bytes, most_keys: int | None = None) -> Any:
    """Read JSON, with at most `most_keys` keys in an object.

    Raises ValueError (of which UnicodeDecodeError and json.JSONDecodeError are kinds)."""

    def bounded(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if most_keys is not None and len(pairs) > most_keys:
            raise ValueError(f"an object has {len(pairs)} keys, at most {most_keys} are allowed")
        return dict(pairs)

    hook = None if most_keys is None else bounded
    return json.loads(text, parse_constant=_refuse, parse_float=_number, object_pairs_hook=hook)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is beyond the range of numbers")
    return value
