"""Queues the requests that wait for a slot, up to a limit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from nvlm_trt.errors import QueueFullError
from nvlm_trt.runtime.request import Request

Condition = Callable[[Request], bool]


class RequestQueue:
    """Holds requests in the order of their arrival. Thread-safe."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._waiting: list[Request] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, request: Request) -> None:
        """Append a request. Raises QueueFullError instead of waiting."""
        with self._lock:
            if len(self._waiting) >= self._capacity:
                raise QueueFullError(
                    f"{len(self._waiting)} requests are waiting and the queue holds {self._capacity}; try again later"
                )
            self._waiting.append(request)

    def snapshot(self) -> list[Request]:
        with self._lock:
            return list(self._waiting)

    def any(self, condition: Condition) -> bool:
        with self._lock:
            return any(map(condition, self._waiting))

    def first(self, condition: Condition, turn: Callable[[Request], Any]) -> Request | None:
        """Return the request with the least `turn` of those for which the condition holds; the oldest of several."""
        return min(filter(condition, self.snapshot()), key=turn, default=None)

    def remove(self, request: Request) -> None:
        with self._lock:
            self._waiting.remove(request)

    def take_all(self, condition: Condition) -> list[Request]:
        """Remove and return all requests for which the condition holds."""
        with self._lock:
            # evaluated once per request: a condition may become true at any time
            verdicts = [(request, condition(request)) for request in self._waiting]
            self._waiting = [request for request, holds in verdicts if not holds]
        return [request for request, holds in verdicts if holds]
