"""Queues the requests that wait for a slot, up to a limit."""

from __future__ import annotations

import threading
from collections.abc import Callable

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

    def take_first(self, condition: Condition, fits: Condition = lambda _: True) -> Request | None:
        """Remove and return the oldest request for which the condition holds, if it fits. No later one is taken
        instead: a large request would wait for as long as small ones come."""
        with self._lock:
            for index, request in enumerate(self._waiting):
                if condition(request):
                    return self._waiting.pop(index) if fits(request) else None
        return None

    def take_all(self, condition: Condition) -> list[Request]:
        """Remove and return all requests for which the condition holds."""
        with self._lock:
            # evaluated once per request: a condition may become true at any time
            verdicts = [(request, condition(request)) for request in self._waiting]
            self._waiting = [request for request, holds in verdicts if not holds]
        return [request for request, holds in verdicts if holds]
