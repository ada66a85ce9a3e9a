"""Defines the options and the steps that all benchmarks of lab share."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lab.code_state import ROOT
from lab.origin import PACKAGES, Origin
from lab.rounds import Contender, Rounds
from nvlm_trt.errors import NvlmError

RESULTS = ROOT / "lab" / "results"  # committed
PICTURES = ROOT / "docs" / "images"  # committed
NOT_SETTINGS = ("work", "json", "rounds", "publish", "peers")  # runs that differ in these alone measure the same


def parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """Makes a parser with the options that all benchmarks have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--work", type=Path, required=True, help="folder that keeps checkpoints, engines and results")
    made.add_argument("--rounds", type=int, default=rounds, help="measured rounds, after one warm-up round")
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    made.add_argument(
        "--json", type=Path, help="file of this run [WORK/results/NAME.json]; an unfinished one is resumed"
    )
    made.add_argument("--publish", action="store_true", help="copy the complete results to lab/results")
    made.add_argument(
        "--contender",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="measure this function, which returns {metric: value}, in place of the benchmark's own; may be repeated",
    )
    return made


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Selects the arguments that change what is measured."""
    return {name: value for name, value in vars(arguments).items() if name not in NOT_SETTINGS}


def run(
    options: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace, Rounds], None],
    result: str,
    packages: Sequence[str] = PACKAGES,
    picture: str | None = None,
) -> None:
    """Parses the command line, measures, and publishes if --publish is given.

    `result` names the JSON file, `picture` the plot that `measure` draws beside it."""
    arguments = options.parse_args()
    if arguments.publish and arguments.contender:
        options.error("--publish takes the benchmark's own contenders only; leave out --contender")
    with one_line_errors():
        arguments.work = arguments.work.absolute()
        rounds = Rounds(result_path(arguments, result), Origin.here(settings_of(arguments), packages))
        if arguments.contender:
            rounds.run({name: contender(name) for name in arguments.contender}, arguments.rounds)
            rounds.report()
        else:
            measure(arguments, rounds)
        if arguments.publish:
            rounds.publish(RESULTS / result)
            if picture is not None:
                shutil.copyfile(result_path(arguments, result).with_name(picture), PICTURES / picture)


def result_path(arguments: argparse.Namespace, result: str) -> Path:
    """Returns the file of this run. Raises NvlmError for a committed one."""
    path: Path = (arguments.json or arguments.work / "results" / result).absolute()
    if path.parent.resolve() == RESULTS:
        raise NvlmError(f"--json {path} is a committed file; --publish writes it when the run is complete")
    return path


def contender(name: str) -> Contender:
    """Imports MODULE:FUNCTION. Raises NvlmError if there is no such function."""
    module, _, function = name.partition(":")
    try:
        found: Contender = getattr(importlib.import_module(module), function)
    except (ImportError, ValueError, AttributeError) as error:
        raise NvlmError(f"--contender {name}: {error}; name a function that can be imported from here") from None
    return found


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the process with one line for errors of the user; an interrupted run has kept its measurements."""
    try:
        yield
    except NvlmError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on from here") from None
