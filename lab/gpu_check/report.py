"""Writes the report: a run's results as one JSON object, and the page made from that object."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lab.code_state import described
from lab.gpu_check.record import MEASURED, NOT_RUN, PASSED, SLOW, WRONG, Check, shown

SECTIONS = {
    "ceilings": "Ceilings of this GPU: a large copy (bytes read and written) and a large matrix product, by torch",
    "attention": "Gated cross-attention: results, against the reference in float64",
    "attention-speed": "Gated cross-attention: time",
    "tile_resample": "tile_resample: results and time",
    "tensorrt": "TensorRT",
    "rtx": "TensorRT-RTX",
    "tune": "Alternatives, the fastest of each shape first",
}
_ORDER = (WRONG, SLOW, PASSED, MEASURED, NOT_RUN)


def load(path: Path) -> dict[str, Any]:
    """Reads a report's JSON. Raises ValueError with one line if the file is not one."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        report["checks"] = [asdict(Check(**check)) for check in report["checks"]]
        report["machine"].items(), report["command"], report["date"], report["seconds"]
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not the JSON of a report ({type(error).__name__}: {error})") from None
    return report


def write(directory: Path, stem: str, report: dict[str, Any]) -> None:
    """Replaces STEM.json and STEM.md, each as a whole."""
    directory.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(report, indent=1, allow_nan=False) + "\n"), (".md", page(report))):
        temporary = directory / f".{stem}{suffix}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, directory / f"{stem}{suffix}")


def page(report: dict[str, Any]) -> str:
    """Writes Markdown: the machine, the number of checks by result, and a table for each kind of check."""
    checks = [Check(**check) for check in report["checks"]]
    code = f" with the code of {described(report['code'])}" if "code" in report else ""
    made = f"Made on {report['date']} by `{report['command']}`{code} in {report['seconds']:.0f} s."
    lines = ["# GPU report", "", f"{made} {summary(checks)}.", ""]
    lines += _table(["machine", ""], [[name, shown(value)] for name, value in report["machine"].items()])
    for section, of_section in itertools.groupby(checks, key=lambda check: check.section):
        lines += ["", f"## {SECTIONS.get(section, section)}"]
        for _, alike in itertools.groupby(of_section, key=_columns):
            lines += ["", *_check_table(list(alike))]
    failed = [check for check in checks if check.trace]
    if failed:
        lines += ["", "## Errors"]
    for check in failed:
        lines += ["", f"{check.section}, {check.name}:", "", "```", check.trace.strip(), "```"]
    return "\n".join(lines) + "\n"


def summary(checks: Sequence[Check]) -> str:
    counts = Counter(check.status for check in checks)
    return ", ".join(f"{counts[status]} {status}" for status in _ORDER if counts[status]) or "Nothing was run"


def _columns(check: Check) -> tuple[str, ...]:
    return tuple(check.values)


def _check_table(checks: Sequence[Check]) -> Iterator[str]:
    columns = _columns(checks[0])
    has_notes = any(check.note for check in checks)
    rows = [
        [check.name, check.status, *(shown(check.values[column]) for column in columns), *[check.note] * has_notes]
        for check in checks
    ]
    return _table(["check", "result", *columns, *["note"] * has_notes], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
