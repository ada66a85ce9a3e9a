"""Reads JSON without what Python adds to it: NaN and infinity, also as a number beyond float's range."""

from __future__ import annotations

import json
import math
from typing import Any


def loads(text: str | bytes) -> Any:
    """Read JSON. Raises ValueError (of which UnicodeDecodeError and json.JSONDecodeError are kinds)."""
    return json.loads(text, parse_constant=_refuse, parse_float=_number)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is beyond the range of numbers")
    return value
