"""Samples the resident memory of processes, and says whether it grows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil

MEBIBYTE = 1 << 20
WARM_UP = 0.3  # share of the samples that come before caches and pools are full
WINDOW = 0.25  # share of the other samples that the start and the end are medians of
FEWEST = 8  # samples without which no growth is told


@dataclass(frozen=True)
class Growth:
    """Holds the memory of a process after its warm-up and at its end, in MiB."""

    start: float
    end: float

    @property
    def mebibytes(self) -> float:
        return self.end - self.start

    @property
    def percent(self) -> float:
        return 100 * self.mebibytes / self.start if self.start else 0.0


def growth(values: Sequence[float], warm_up: float = WARM_UP) -> Growth | None:
    """Compares the medians of the first and the last samples after the warm-up. None for too few samples.

    A median leaves out what a single request needs for a moment; a leak lifts it."""
    kept = values[int(len(values) * warm_up) :]
    if len(kept) < FEWEST:
        return None
    window = max(1, int(len(kept) * WINDOW))
    return Growth(statistics.median(kept[:window]), statistics.median(kept[-window:]))


class MemoryWatch:
    """Keeps samples of processes by role, in MiB. A process that replaces another begins anew."""

    def __init__(self, processes: Callable[[], Mapping[str, int]]) -> None:
        """`processes` returns role -> pid."""
        self._processes = processes
        self._samples: dict[tuple[str, int], list[float]] = {}

    def sample(self, kept: Mapping[str, float] | None = None) -> None:
        """Takes one sample of every process, less what it keeps on purpose (`kept`: role -> MiB)."""
        for role, pid in self._processes().items():
            resident = resident_mebibytes(pid)
            if resident is not None:
                self._samples.setdefault((role, pid), []).append(resident - (kept or {}).get(role, 0.0))

    def growths(self) -> dict[str, Growth]:
        """Returns the growth of each role: that of the process that grew most."""
        found: dict[str, Growth] = {}
        for (role, _), values in self._samples.items():
            of_process = growth(values)
            if of_process and (role not in found or of_process.mebibytes > found[role].mebibytes):
                found[role] = of_process
        return found


def resident_mebibytes(pid: int) -> float | None:
    """Reads the resident memory of a process; None if the process has ended."""
    try:
        return float(psutil.Process(pid).memory_info().rss) / MEBIBYTE
    except psutil.Error:
        return None
