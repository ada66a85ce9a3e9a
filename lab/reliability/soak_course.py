"""Asks a server without a pause, and counts answers, errors, latencies and memory over time."""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from lab.reliability.answers import FirstAnswers
from lab.reliability.memory import MemoryWatch
from lab.reliability.question import SoakQuestion
from lab.reliability.wire import Reply, refused

WARM_UP = 0.1  # share of a stretch
_WINDOW_SECONDS = 600.0
_SAMPLES = 400  # of memory in a stretch
_MOST_LINES = 20

Ask = Callable[[SoakQuestion], Reply]


@dataclass
class Stretch:
    """Holds what one server did without a pause. A run that was interrupted has several."""

    seconds: float = 0.0
    requests: dict[str, int] = field(default_factory=dict)  # by kind
    errors: int = 0
    differing: int = 0
    growth_mb: dict[str, float] = field(default_factory=dict)
    growth_percent: dict[str, float] = field(default_factory=dict)
    window_s: float = 0.0
    first_p95_ms: float = 0.0
    last_p95_ms: float = 0.0
    lines: list[str] = field(default_factory=list)  # the first errors

    @property
    def drift_percent(self) -> float:
        return 100 * (self.last_p95_ms / self.first_p95_ms - 1) if self.first_p95_ms else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class SoakCourse:
    """Keeps `concurrency` requests running. `ask` sends one; `processes` and `kept` are those of a server."""

    def __init__(
        self,
        ask: Ask,
        questions: Iterator[SoakQuestion],
        processes: Callable[[], Mapping[str, int]],
        kept: Callable[[], Mapping[str, float]],
        concurrency: int,
    ) -> None:
        self._ask, self._questions, self._kept = ask, questions, kept
        self._concurrency = concurrency
        self._memory = MemoryWatch(processes)
        self._first = FirstAnswers()
        self._lock = threading.Lock()
        self._latencies: list[tuple[float, float]] = []  # end since the start, seconds of it
        self._counts: Counter[str] = Counter()
        self._stop = threading.Event()
        self.stretch = Stretch()

    def run(self, seconds: float, alive: Callable[[], bool], keep: Callable[[Stretch], None]) -> Stretch:
        """Asks for `seconds`, or until the server has ended. `keep` is called now and then with what is known."""
        self._started = time.monotonic()
        pause = max(0.2, seconds * (1 - WARM_UP) / _SAMPLES)
        with ThreadPoolExecutor(self._concurrency) as users:
            working = [users.submit(self._user) for _ in range(self._concurrency)]
            kept_at = 0.0
            while (now := time.monotonic() - self._started) < seconds and alive():
                if now > WARM_UP * seconds:
                    self._memory.sample(self._kept())
                if now - kept_at > 30:
                    kept_at = now
                    keep(self._told(seconds))
                self._stop.wait(pause)
            self._stop.set()
            for user in working:
                user.result()
        if not alive():
            self._fault("the server ended")
        return self._told(seconds)

    def _user(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                question = next(self._questions)
            started = time.monotonic()
            reply = self._ask(question)
            ended = time.monotonic()
            self._judge(question, reply)
            with self._lock:
                self._counts[question.kind] += 1
                if question.leaves_after is None and not question.wrong:
                    self._latencies.append((ended - self._started, ended - started))

    def _judge(self, question: SoakQuestion, reply: Reply) -> None:
        if question.wrong:
            if not refused(reply):
                self._fault(f"a wrong request: {reply.broken or reply.error or 'it was answered'}")
        elif not reply.answered:
            self._fault(f"{question.kind}: {reply.broken or reply.error}")
        else:
            difference = self._first.difference(question.key, reply.tokens, question.leaves_after is None)
            if difference:
                with self._lock:
                    self.stretch.differing += 1
                    self._add_line(f"{question.kind}: {difference}")

    def _fault(self, line: str) -> None:
        with self._lock:
            self.stretch.errors += 1
            self._add_line(line)

    def _add_line(self, line: str) -> None:
        if len(self.stretch.lines) < _MOST_LINES:
            self.stretch.lines.append(line)

    def _told(self, whole: float) -> Stretch:
        """Brings the stretch up to date."""
        with self._lock:
            stretch, latencies = self.stretch, list(self._latencies)
            stretch.requests = dict(self._counts)
        stretch.seconds = round(time.monotonic() - self._started, 1)
        begin = WARM_UP * whole
        stretch.window_s = round(min(_WINDOW_SECONDS, max(0.0, stretch.seconds - begin) / 3), 1)
        first = [s for at, s in latencies if begin <= at < begin + stretch.window_s]
        last = [s for at, s in latencies if at >= stretch.seconds - stretch.window_s]
        stretch.first_p95_ms, stretch.last_p95_ms = p95_ms(first), p95_ms(last)
        grown = self._memory.growths()
        stretch.growth_mb = {role: round(found.mebibytes, 1) for role, found in sorted(grown.items())}
        stretch.growth_percent = {role: round(found.percent, 2) for role, found in sorted(grown.items())}
        return stretch


def p95_ms(seconds: list[float]) -> float:
    """Returns the 95th percentile in milliseconds; 0 for too few values."""
    return round(1e3 * statistics.quantiles(seconds, n=20)[-1], 1) if len(seconds) > 1 else 0.0
