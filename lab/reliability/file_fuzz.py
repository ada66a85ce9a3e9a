"""Decodes the numbered files of a seed in worker processes, and counts what became of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from lab.reliability.decode_worker import DECODED, FAULT, REFUSED, DecodeWorker, FileOutcome
from lab.reliability.file_cases import file_case
from lab.reliability.finding import FILES, Finding
from lab.reliability.memory import growth

BUDGET_SECONDS = 30.0  # per file, on a machine that does other work too
FLAT_MEBIBYTES = 24.0  # growth that the allocator explains
FLAT_PERCENT = 10.0


@dataclass
class FileCounts:
    """Holds what is known of the files up to `done`. The record of a run keeps it."""

    done: int = 0
    decoded: int = 0
    refused: int = 0
    faults: int = 0
    slowest_s: float = 0.0
    slowest: str = ""
    peak_mb: float = 0.0
    growth_mb: float = 0.0
    growth_percent: float = 0.0
    seconds: float = 0.0
    findings: list[str] = field(default_factory=list)

    def add(self, outcome: FileOutcome, made: str) -> None:
        self.decoded += outcome.verdict == DECODED
        self.refused += outcome.verdict == REFUSED
        self.faults += outcome.verdict == FAULT
        self.peak_mb = max(self.peak_mb, round(outcome.peak, 1))
        if outcome.seconds > self.slowest_s:
            self.slowest_s, self.slowest = round(outcome.seconds, 3), made

    @property
    def leaks(self) -> bool:
        return self.growth_mb > FLAT_MEBIBYTES and self.growth_percent > FLAT_PERCENT

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class FileFuzz:
    """Runs one decode worker per thread."""

    def __init__(self, seed: int, decoder: str, counts: FileCounts, workers: int, budget: float) -> None:
        self.counts = counts
        self._seed, self._workers = seed, workers
        self._own = threading.local()
        self._started: list[DecodeWorker] = []
        self._memory: dict[int, list[float]] = {}
        self._lock = threading.Lock()
        self._make: Callable[[], DecodeWorker] = lambda: DecodeWorker(seed, decoder, budget)

    def run(self, until: int, block: int, deadline: float) -> Iterator[list[Finding]]:
        """Decodes the files up to number `until` in blocks. Yields the findings of each block."""
        with ThreadPoolExecutor(self._workers) as threads:
            try:
                while self.counts.done < until and time.monotonic() < deadline:
                    yield self._block(threads, range(self.counts.done, min(until, self.counts.done + block)))
            finally:
                for worker in self._started:
                    worker.close()

    def _block(self, threads: ThreadPoolExecutor, numbers: range) -> list[Finding]:
        started = time.monotonic()
        outcomes = list(threads.map(self._decode, numbers))
        findings = []
        for number, outcome in zip(numbers, outcomes, strict=True):
            made = ""
            if outcome.verdict == FAULT or outcome.seconds > self.counts.slowest_s:
                made = file_case(self._seed, number).made
            self.counts.add(outcome, made)
            if outcome.verdict == FAULT:
                data = file_case(self._seed, number).data
                findings.append(Finding.of(FILES, self._seed, number, made, outcome.detail, data))
        self.counts.findings += [finding.line for finding in findings]
        self.counts.done = numbers.stop
        self.counts.seconds = round(self.counts.seconds + time.monotonic() - started, 1)
        self._note_growth()
        return findings

    def _decode(self, number: int) -> FileOutcome:
        worker = getattr(self._own, "worker", None)
        if worker is None:
            worker = self._own.worker = self._make()
            with self._lock:
                self._started.append(worker)
        outcome = worker.run(number)
        if outcome.resident:
            with self._lock:
                self._memory.setdefault(worker.pid, []).append(outcome.resident)
        return outcome

    def _note_growth(self) -> None:
        """Keeps the growth of the worker that grew most in this run."""
        grown = [found for values in self._memory.values() if (found := growth(values)) is not None]
        if grown:
            worst = max(grown, key=lambda found: found.mebibytes)
            self.counts.growth_mb, self.counts.growth_percent = round(worst.mebibytes, 1), round(worst.percent, 1)
