"""Measures in rounds: each contender once per round, in turn, so that a noisy machine disturbs all alike."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lab.origin import Origin
from lab.run_file import Record, RunFile
from lab.spread import Spread, short
from nvlm_trt.errors import NvlmError

Contender = Callable[[], Mapping[str, float]]  # one measurement: metric -> value
Values = dict[str, dict[str, list[float]]]  # contender -> metric -> a value per round


class Rounds:
    """The values of every round, written to a JSON file after each measurement.

    `run` resumes a file of the same machine, code, versions, settings and contenders, and sets any other file aside. A
    ratio is that of two medians; its spread is that of the ratios within the rounds."""

    def __init__(self, path: Path, origin: Origin) -> None:
        self._file = RunFile(path, origin)
        self._wanted = 1
        self._skipped: Sequence[str] = ()
        self.values: Values = {}

    def add_versions(self, versions: Mapping[str, str]) -> None:
        """Adds, before `run`, the versions of all that the contenders use besides the packages of this environment."""
        self._file.add_versions(versions)

    def run(self, contenders: Mapping[str, Contender], rounds: int, warm_up: bool = True) -> None:
        """Measures each contender until it has `rounds` values, after one measurement that is not kept.

        Measures nothing if all values are there already."""
        self._wanted = rounds
        self.values = {name: {} for name in contenders}

        def difference(record: Record) -> str | None:
            changed = sorted(set(checked(record["rounds"])) ^ set(contenders))
            return f"it has other contenders ({', '.join(changed)})" if changed else None

        def content(record: Record) -> str:
            complete = min((count(metrics) for metrics in record["rounds"].values()), default=0)
            return f"{complete} of {rounds} rounds are there"

        if self._file.resume(difference, content):
            self.values = self._file.record["rounds"]
        if self._complete():
            return
        for name, measure in contenders.items() if warm_up else ():
            _tell("warm-up", name, measure())
        for number in range(rounds):
            for name, measure in contenders.items():
                if count(self.values[name]) <= number:
                    measured = measure()
                    for metric, value in measured.items():
                        self.values[name].setdefault(metric, []).append(float(value))
                    self._file.keep({"rounds": self.values})
                    _tell(f"round {number + 1} of {rounds}", name, measured)

    def spread(self, name: str, metric: str) -> Spread:
        return Spread.of(self.values[name][metric])

    def ratio(self, metric: str, name: str, baseline: str) -> Spread:
        """Divides the values of `name` by those of `baseline`."""
        ours, theirs = self.values[name][metric], self.values[baseline][metric]
        within = [a / b for a, b in zip(ours, theirs, strict=True)]
        return Spread(statistics.median(ours) / statistics.median(theirs), min(within), max(within))

    def best(self, metric: str, prefix: str, largest: bool) -> str | None:
        """Returns the contender with the best median among those whose name starts with `prefix`; None without any."""
        names = [name for name in self.values if name.startswith(prefix)]
        choose = max if largest else min
        return choose(names, key=lambda name: self.spread(name, metric).median) if names else None

    def report(self, ratios: Sequence[tuple[str, str, str]] = (), skipped: Sequence[str] = (), **others: Any) -> None:
        """Prints the table and the ratios (metric, name, baseline), and writes both with `others` to the file.

        `skipped` has one line for each contender that could not be measured."""
        self._skipped = skipped
        compared = [(metric, name, baseline, self.ratio(metric, name, baseline)) for metric, name, baseline in ratios]
        summary = {
            name: {metric: asdict(self.spread(name, metric)) for metric in metrics}
            for name, metrics in self.values.items()
        }
        found = [
            {"metric": metric, "of": name, "to": baseline, **asdict(ratio)}
            for metric, name, baseline, ratio in compared
        ]
        self._file.write({"summary": summary, "ratios": found, **others, "rounds": self.values})
        print(*self.table(), sep="\n")
        for metric, name, baseline, ratio in compared:
            print(f"{metric}: {name} / {baseline} = {ratio}")
        print(f"wrote {self._file.path}")

    def table(self) -> Iterator[str]:
        """Yields when, where and with which code the rounds were measured, then a Markdown table of the spreads."""
        metrics = list(dict.fromkeys(metric for of_name in self.values.values() for metric in of_name))
        yield self._file.origin_line()
        yield ""
        yield f"| median (lowest to highest) | {' | '.join(metrics)} |"
        yield "|---" * (len(metrics) + 1) + "|"
        for name, of_name in self.values.items():
            cells = [str(self.spread(name, metric)) if metric in of_name else "" for metric in metrics]
            yield f"| {name} | {' | '.join(cells)} |"

    def publish(self, path: Path) -> None:
        """Copies the file to `path`. Raises NvlmError if rounds or contenders are missing."""
        if self._skipped:
            raise NvlmError(f"{path} is not written: {'; '.join(self._skipped)}")
        if not self._complete():
            raise NvlmError(f"{path} is not written: some contenders have fewer than {self._wanted} rounds")
        self._file.copy(path)
        print(f"wrote {path}")

    def _complete(self) -> bool:
        return bool(self.values) and all(count(metrics) >= self._wanted for metrics in self.values.values())


def count(metrics: Mapping[str, Sequence[float]]) -> int:
    """Counts the rounds of one contender."""
    return min((len(values) for values in metrics.values()), default=0)


def checked(values: Values) -> Values:
    """Raises ValueError for rounds that no run writes: a metric without its value, or a value that is not a number."""
    for metrics in values.values():
        for numbers in metrics.values():
            if len(numbers) != count(metrics) or not all(isinstance(number, float) for number in numbers):
                raise ValueError("rounds must be lists of numbers of one length")
    return values


def _tell(when: str, name: str, measured: Mapping[str, float]) -> None:
    shown = ", ".join(f"{metric} {short(value)}" for metric, value in measured.items())
    print(f"{when}: {name}: {shown}", file=sys.stderr, flush=True)
