"""Defines a kind of chaos: what happens to the product, what it promises then, and the check of that promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lab.reliability.place import Place

Check = Callable[[Place], None]


@dataclass(frozen=True)
class Kind:
    """Names a situation. `check` brings it about, and raises BrokenPromise, or NotHere where it cannot be had."""

    name: str
    promise: str
    check: Check


def kind(kinds: list[Kind], name: str, promise: str) -> Callable[[Check], Check]:
    """Adds the decorated check to `kinds`."""

    def add(check: Check) -> Check:
        kinds.append(Kind(name, promise, check))
        return check

    return add
