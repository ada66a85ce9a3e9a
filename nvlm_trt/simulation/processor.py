"""Simulates the time of one engine: steps of the scheduler and the vision encoder, alone and together."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from nvlm_trt.simulation.step_seconds import Overlap

_INSTANT = 1e-12  # seconds: what is due so soon is due now


@dataclass
class _Image:
    left: float  # seconds of work
    done: Callable[[], None]


class Processor:
    """Holds the clock, `now` in seconds. Images are encoded one after the other, beside the steps."""

    def __init__(self, overlap: Overlap) -> None:
        self.now = 0.0
        self._overlap = overlap
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._images: deque[_Image] = deque()

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Call `action` at a time that is to come, also in the middle of a step."""
        heapq.heappush(self._timers, (when, next(self._order), action))

    def encode(self, seconds: float, done: Callable[[], None]) -> None:
        """Encode an image behind those that wait, then call `done`."""
        self._images.append(_Image(seconds, done))

    def step(self, seconds: float) -> None:
        """Let the time of a step pass, `seconds` long if no image is encoded meanwhile."""
        while seconds > _INSTANT:
            slowed = self._overlap.step if self._images else 1.0
            passed = self._pass(seconds * slowed, self._overlap.encode)
            seconds -= passed / slowed

    def wait(self) -> bool:
        """Let time pass until something happens. Return False if nothing is left to happen."""
        if not self._images and not self._timers:
            return False
        self._pass(float("inf"), 1.0)
        return True

    def _pass(self, most: float, encoder_slowed: float) -> float:
        """Let time pass until the next event, at most `most` seconds. Return the seconds that passed."""
        seconds = most
        if self._timers:
            seconds = min(seconds, max(self._timers[0][0] - self.now, 0.0))
        if self._images:
            seconds = min(seconds, self._images[0].left * encoder_slowed)
        self.now += seconds
        if self._images:
            self._images[0].left -= seconds / encoder_slowed
            if self._images[0].left <= _INSTANT:
                self._images.popleft().done()
        while self._timers and self._timers[0][0] <= self.now + _INSTANT:
            heapq.heappop(self._timers)[2]()
        return seconds
