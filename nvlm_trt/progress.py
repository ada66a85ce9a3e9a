"""Reports the progress of long-running work to its caller: `progress(description, done, total)`."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float, float], None]


class Bytes(int):
    """A total that counts bytes: a bar shows them beside the time left."""


def no_progress(description: str, done: float, total: float) -> None:
    """Show nothing."""
