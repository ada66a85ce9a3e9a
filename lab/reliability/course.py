"""Defines the options and the steps that fuzz, chaos and soak share."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.common import RESULTS, one_line_errors, result_path
from lab.engines import random_engine
from lab.origin import Origin
from lab.reliability.promise import BrokenPromise
from lab.run_file import RunFile
from nvlm_trt.errors import NvlmError

PACKAGES = ("nvlm-trt", "onnxruntime", "numpy", "Pillow", "tritonclient", "nvidia-pytriton")
FAULTS = 1  # exit status of a run that saw a fault
# runs that differ in these alone go on with each other's results
NOT_SETTINGS = ("work", "json", "publish", "replay", "seconds", "only", "list", "files", "requests", "minutes")


@dataclass
class Verdict:
    """Says what a run lacks before it may be published, and which faults it saw."""

    missing: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


Measure = Callable[[argparse.Namespace, RunFile], Verdict]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Makes a parser with the options that all three have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--work", type=Path, required=True, help="folder that keeps engines, findings and results")
    made.add_argument("--seed", type=int, default=1, help="the same seed makes the same inputs")
    made.add_argument("--preset", default="nvlm-h-tiny", help="preset of the random engine that is served")
    made.add_argument("--json", type=Path, help="file of this run [WORK/results/NAME.json]; an unfinished one goes on")
    made.add_argument("--publish", action="store_true", help="copy a complete run to lab/results and write the page")
    return made


def run(options: argparse.ArgumentParser, measure: Measure, result: str) -> None:
    """Parses the command line, measures, publishes if asked, and exits with 1 if faults were seen."""
    arguments = options.parse_args()
    with one_line_errors(), broken_promises():
        arguments.work = arguments.work.absolute()
        settings = {name: value for name, value in vars(arguments).items() if name not in NOT_SETTINGS}
        file = RunFile(result_path(arguments, result), Origin.here(settings, PACKAGES))
        verdict = measure(arguments, file)
        for line in verdict.faults:
            print(f"fault: {line}", file=sys.stderr)
        if arguments.publish:
            publish(file, verdict, result)
    if verdict.faults:
        sys.exit(FAULTS)


@contextlib.contextmanager
def broken_promises() -> Iterator[None]:
    """Turns a server that does not even start into an error of one line."""
    try:
        yield
    except BrokenPromise as broken:
        raise NvlmError(str(broken)) from None


def publish(file: RunFile, verdict: Verdict, result: str) -> None:
    """Copies the record to lab/results and writes the page. Raises NvlmError for a run that is not complete."""
    from lab.reliability.page import write_page  # the page imports the table of every command

    if verdict.missing:
        raise NvlmError(f"{RESULTS / result} is not written: {'; '.join(verdict.missing)}")
    file.copy(RESULTS / result)
    write_page()
    print(f"wrote {RESULTS / result} and the page")


def served_engine(arguments: argparse.Namespace) -> Path:
    """Builds or finds the engine that a run serves."""
    return Path(random_engine(arguments.work, arguments.preset, "fp32").path)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def never_differs(record: dict[str, Any]) -> None:
    """Stands for a run that can go on with any record of its origin."""


def shortened(lines: Sequence[str], most: int = 20) -> list[str]:
    """Keeps the first lines, and says how many are left out."""
    return [*lines[:most], *([f"and {len(lines) - most} more"] if len(lines) > most else [])]
