"""Records the results of trials as checks, one a line, so that a process that dies loses none of them."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

Value = float | int | str | bool | None

PASSED = "passed"
WRONG = "WRONG"
SLOW = "slower than its target"
MEASURED = "measured"
NOT_RUN = "not run"


class NotAvailableError(Exception):
    """The machine lacks something that a trial needs; the message names it."""


@dataclass(frozen=True)
class Result:
    """A trial's outcome: the report shows `values` as columns of a table, `note` at its end."""

    status: str
    values: dict[str, Value] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Check:
    """A trial's result under its name."""

    section: str
    name: str
    status: str
    values: dict[str, Value] = field(default_factory=dict)
    note: str = ""
    trace: str = ""


Trial = tuple[str, Callable[[], Result]]


class Record:
    """Checks in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, check: Check) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            values = {name: _finite(value) for name, value in check.values.items()}  # JSON has no infinity
            file.write(json.dumps(asdict(check) | {"values": values}, allow_nan=False) + "\n")

    def read(self) -> list[Check]:
        """Skips a last line that a dying process left half-written."""
        checks = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                checks.append(Check(**json.loads(line)))
            except ValueError:
                continue
        return checks


def perform(section: str, trials: Iterable[Trial], record: Record, deadline: float) -> None:
    """Runs the trials in turn until time.time() reaches `deadline`. A trial that fails does not stop those after it."""
    for name, trial in trials:
        started = time.time()
        if started >= deadline:
            record.add(Check(section, name, NOT_RUN, note="the time was up"))
            continue
        check = _performed(section, name, trial)
        record.add(check)
        print(f"{section}: {name}: {check.status} ({time.time() - started:.1f} s){_details(check)}", flush=True)


def _performed(section: str, name: str, trial: Callable[[], Result]) -> Check:
    try:
        result = trial()
    except NotAvailableError as error:
        return Check(section, name, NOT_RUN, note=str(error))
    except Exception as error:  # any error: the next trial may say more
        line = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return Check(section, name, WRONG, note=line, trace=traceback.format_exc())
    return Check(section, name, result.status, result.values, result.note)


def _finite(value: Value) -> Value:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _details(check: Check) -> str:
    details = [f"{name} {shown(value)}" for name, value in check.values.items()] + [check.note] * bool(check.note)
    return ": " + ", ".join(details) if details else ""


def shown(value: Value) -> str:
    """Writes three digits, and for numbers below a million all digits before the decimal point."""
    if isinstance(value, float):
        return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"
    return "" if value is None else str(value)
