"""Lets threads through a narrow place, so many at a time, in the order of their arrival."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

IsOver = Callable[[], bool]

_POLL_SECONDS = 0.05


class AbandonedError(Exception):
    """Says that nobody needs the result of some work any more."""


def never() -> bool:
    """Stand for a request that is never over."""
    return False


class Lane:
    """Holds at most `size` threads. A place that becomes free is handed to the thread that has waited longest."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._waiting: deque[threading.Event] = deque()  # set once the thread has its place
        self._lock = threading.Lock()

    def enter(self, is_over: IsOver = never) -> None:
        """Wait for a place. Raises AbandonedError once `is_over` returns True before that."""
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn = threading.Event()
            self._waiting.append(turn)
        try:
            while not turn.wait(_POLL_SECONDS):
                if is_over():
                    raise AbandonedError
        except BaseException:
            self._give_up(turn)
            raise

    def try_enter(self) -> bool:
        """Take a place if one is free."""
        with self._lock:
            self._free -= (entered := self._free > 0)
            return entered

    def leave(self) -> None:
        """Give the place back. Any thread may do so."""
        with self._lock:
            self._hand_on()

    @contextlib.contextmanager
    def turn(self, is_over: IsOver = never) -> Iterator[None]:
        """Hold a place during a `with` block."""
        self.enter(is_over)
        try:
            yield
        finally:
            self.leave()

    def _give_up(self, turn: threading.Event) -> None:
        with self._lock:
            if turn.is_set():  # the place was handed over at the last moment
                self._hand_on()
            else:
                self._waiting.remove(turn)

    def _hand_on(self) -> None:
        if self._waiting:
            self._waiting.popleft().set()
        else:
            self._free += 1
