"""What the comparisons share: their engines, rounds that go on where they were interrupted, one JSON, one table.

Every contender is run once per round, in turn, so that a noisy machine disturbs all of them alike. A ratio is that of
two medians; its spread is that of the ratios within the rounds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine
from nvlm_trt.checkpoint.random_checkpoint import init_checkpoint
from nvlm_trt.engine import CALIBRATION, Engine
from nvlm_trt.errors import NvlmError

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("nvlm-trt", "onnxruntime", "numpy", "torch", "transformers")

Contender = Callable[[], Mapping[str, float]]  # one measurement: metric -> value


@dataclass(frozen=True)
class Spread:
    """Of a metric over the rounds, or of a ratio."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{_short(self.median)} ({_short(self.lowest)} to {_short(self.highest)})"


class Rounds:
    """The values of every round, written to a JSON file after each measurement.

    A file of the same settings, versions and contenders is gone on with; one of others is not overwritten."""

    def __init__(self, path: Path, settings: Mapping[str, Any], packages: Sequence[str] = PACKAGES) -> None:
        self._path = path
        self.record: dict[str, Any] = {
            "benchmark": Path(sys.argv[0]).stem,
            "command": shlex.join(["python", *sys.argv]),
            "machine": machine(),
            "versions": versions(packages),
            "settings": json.loads(json.dumps(settings, default=str)),
        }
        self.values: dict[str, dict[str, list[float]]] = {}  # contender -> metric -> a value per round
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            for what in ("settings", "versions"):
                if before[what] != self.record[what]:
                    raise NvlmError(f"{path} is of other {what}; remove it or choose another --json")
            self.record = before
            self.values = before["rounds"]

    def run(self, contenders: Mapping[str, Contender], rounds: int, warm_up: bool = True) -> None:
        """Up to `rounds` measurements of each, after one that is not kept; nothing if they are there already."""
        if self.values and set(self.values) != set(contenders):
            changed = ", ".join(sorted(set(self.values) ^ set(contenders)))
            raise NvlmError(f"{self._path} differs in {changed}; remove it or choose another --json")
        self.values = self.values or {name: {} for name in contenders}
        if all(self._count(name) >= rounds for name in contenders):
            return
        for name, measure in contenders.items() if warm_up else ():
            self._tell("warm-up", name, measure())
        for number in range(rounds):
            for name, measure in contenders.items():
                if self._count(name) <= number:
                    measured = measure()
                    self._keep(name, measured)
                    self._tell(f"round {number + 1} of {rounds}", name, measured)

    def spread(self, name: str, metric: str) -> Spread:
        return Spread.of(self.values[name][metric])

    def ratio(self, metric: str, name: str, baseline: str) -> Spread:
        """How many times `baseline`'s value `name` has."""
        ours, theirs = self.values[name][metric], self.values[baseline][metric]
        within = [a / b for a, b in zip(ours, theirs, strict=True)]
        return Spread(statistics.median(ours) / statistics.median(theirs), min(within), max(within))

    def best(self, metric: str, prefix: str, largest: bool) -> str | None:
        """The contender with the best median among those that are named so; None without any."""
        names = [name for name in self.values if name.startswith(prefix)]
        choose = max if largest else min
        return choose(names, key=lambda name: self.spread(name, metric).median) if names else None

    def report(self, ratios: Sequence[tuple[str, str, str]], **others: Any) -> None:
        """Print the table and the ratios (metric, name, baseline), and write both with `others` to the file."""
        self.record["summary"] = {
            name: {metric: asdict(self.spread(name, metric)) for metric in metrics}
            for name, metrics in self.values.items()
        }
        compared = [(metric, name, baseline, self.ratio(metric, name, baseline)) for metric, name, baseline in ratios]
        self.record["ratios"] = [
            {"metric": metric, "of": name, "to": baseline, **asdict(ratio)}
            for metric, name, baseline, ratio in compared
        ]
        self.record |= others
        self._save()
        print(*self.table(), sep="\n")
        for metric, name, baseline, ratio in compared:
            print(f"{metric}: {name} / {baseline} = {ratio}")
        print(f"wrote {self._path}")

    def table(self) -> Iterator[str]:
        metrics = list(dict.fromkeys(metric for of_name in self.values.values() for metric in of_name))
        yield f"| median (lowest to highest) | {' | '.join(metrics)} |"
        yield "|---" * (len(metrics) + 1) + "|"
        for name, of_name in self.values.items():
            cells = [str(self.spread(name, metric)) if metric in of_name else "" for metric in metrics]
            yield f"| {name} | {' | '.join(cells)} |"

    def _count(self, name: str) -> int:
        return min((len(values) for values in self.values[name].values()), default=0)

    def _keep(self, name: str, measured: Mapping[str, float]) -> None:
        for metric, value in measured.items():
            self.values[name].setdefault(metric, []).append(value)
        self._save()

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.record | {"rounds": self.values}, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self._path)

    @staticmethod
    def _tell(when: str, name: str, measured: Mapping[str, float]) -> None:
        shown = ", ".join(f"{metric} {_short(value)}" for metric, value in measured.items())
        print(f"{when}: {name}: {shown}", file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What the numbers depend on; the load is what others had the machine do when the benchmark began."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    kilobytes = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"note: the machine is busy (load {load:.1f}); its numbers will scatter", file=sys.stderr)
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(kilobytes[0] / 1e6, 1) if kilobytes else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": load,
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    installed = {}
    for package in packages:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def parser(doc: str | None, json_name: str, rounds: int) -> argparse.ArgumentParser:
    """With the options that all have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--work", type=Path, required=True, help="keeps checkpoints and engines between runs")
    made.add_argument("--rounds", type=int, default=rounds, help="measured, after one that warms up")
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    made.add_argument(
        "--json", type=Path, default=RESULTS / json_name, help="written; an unfinished one is gone on with"
    )
    return made


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What makes two runs the same: not where they are kept, nor how many rounds there are to be."""
    return {name: value for name, value in vars(arguments).items() if name not in ("work", "json", "rounds")}


def random_checkpoint(work: Path, preset: str) -> Path:
    checkpoint = work / "checkpoints" / preset
    if not checkpoint.exists():
        print(f"writing {checkpoint}", file=sys.stderr, flush=True)
        init_checkpoint(checkpoint, preset, seed=0)
    return checkpoint


def built_engine(work: Path, preset: str, precision: str) -> Engine:
    """Of a random checkpoint, below `work`. Ungated: random weights have nothing to lose."""
    checkpoint = random_checkpoint(work, preset)
    output = work / "engines" / f"{preset}-{precision.replace('=', '-').replace(',', '+')}"
    if not output.exists():
        print(f"building {output}", file=sys.stderr, flush=True)
        saved = work / f"{preset}.{CALIBRATION}"
        # speed does not depend on the scales: a sample of each task will do
        options = (
            QuantizationOptions(calibration=saved, gate=None)
            if saved.exists()
            else QuantizationOptions(calibration_samples=14, gate=None)
        )
        build_engine(checkpoint, output, precision=precision, quantization=options)
        if (output / CALIBRATION).exists() and not saved.exists():
            saved.write_bytes((output / CALIBRATION).read_bytes())
    return Engine.open(output)


def run_main(main: Callable[[], None]) -> None:
    """Errors are one line; an interrupted run has kept what it measured."""
    try:
        main()
    except NvlmError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on from here") from None


def _short(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
