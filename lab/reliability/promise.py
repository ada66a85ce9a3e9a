"""Checks promises: a broken one is an exception whose message says in one line what was seen."""

from __future__ import annotations

import time
from collections.abc import Callable

_POLL_SECONDS = 0.05


class BrokenPromise(Exception):  # noqa: N818 - named after what it says
    """Something else happened than the product promises."""


class NotHere(Exception):  # noqa: N818
    """This machine cannot bring the situation about; the message says why."""


def require(holds: bool, seen: str) -> None:
    """Raises BrokenPromise with what was seen instead."""
    if not holds:
        raise BrokenPromise(" ".join(seen.split()))


def wait_until(condition: Callable[[], bool], seen: str, seconds: float = 30.0) -> None:
    """Waits for a condition. Raises BrokenPromise if it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        require(time.monotonic() < deadline, f"{seen}, also after {seconds:.0f} s")
        time.sleep(_POLL_SECONDS)
