"""The bounded queue in front of the slots."""

from __future__ import annotations

import threading
from collections.abc import Callable

from nvlm_trt.errors import QueueFullError
from nvlm_trt.runtime.generation import Submission

Condition = Callable[[Submission], bool]


class RequestQueue:
    """Submissions in the order of their arrival; any thread may use it."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._waiting: list[Submission] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, submission: Submission) -> None:
        """Raises QueueFullError, at once."""
        with self._lock:
            if len(self._waiting) >= self._capacity:
                raise QueueFullError(
                    f"{len(self._waiting)} requests are waiting and the queue holds {self._capacity}; try again later"
                )
            self._waiting.append(submission)

    def snapshot(self) -> list[Submission]:
        with self._lock:
            return list(self._waiting)

    def any(self, condition: Condition) -> bool:
        with self._lock:
            return any(map(condition, self._waiting))

    def take_first(self, condition: Condition) -> Submission | None:
        """Remove and return the oldest submission for which the condition holds."""
        with self._lock:
            for index, submission in enumerate(self._waiting):
                if condition(submission):
                    return self._waiting.pop(index)
        return None

    def take_all(self, condition: Condition) -> list[Submission]:
        """Remove and return all submissions for which the condition holds."""
        with self._lock:
            # asked once for each, since it may begin to hold at any time
            verdicts = [(submission, condition(submission)) for submission in self._waiting]
            self._waiting = [submission for submission, holds in verdicts if not holds]
        return [submission for submission, holds in verdicts if holds]
