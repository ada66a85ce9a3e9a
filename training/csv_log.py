"""Logs a training stage as CSV."""

from __future__ import annotations

import csv
from pathlib import Path


class CsvLog:
    """A CSV file that grows by rows. On resuming at step `start`, drops the rows of later steps."""

    def __init__(self, path: Path, start: int) -> None:
        self.averages: dict[str, float] = {}
        self._path = path
        if path.exists():
            with path.open(newline="") as file:
                rows = list(csv.reader(file))
            kept = rows[:1] + [row for row in rows[1:] if row and int(row[0]) <= start]
            with path.open("w", newline="") as file:
                csv.writer(file).writerows(kept if start else [])

    def average(self, values: dict[str, float]) -> None:
        """Updates the running means, over about 25 steps."""
        for name, value in values.items():
            self.averages[name] = self.averages.get(name, value) * 0.96 + value * 0.04

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends a row, and prints it."""
        new = not self._path.exists() or not self._path.stat().st_size
        with self._path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", *values])
            writer.writerow([step, *(f"{value:.5g}" for value in values.values())])
        print(f"{self._path.parent.name} {step}", *(f"{k} {v:.4g}" for k, v in values.items()), flush=True)
