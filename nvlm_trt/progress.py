"""How long-running work reports how far it is: `progress(description, done, total)`, drawn by whoever called it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float, float], None]


def no_progress(description: str, done: float, total: float) -> None:
    """For callers that show nothing."""
