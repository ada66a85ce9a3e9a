"""Writes the tables of docs/reliability.md from the results of fuzz, chaos and soak.

python -m lab.reliability.page
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lab.code_state import ROOT
from lab.common import RESULTS
from lab.marked_page import replace_between
from lab.origin import origin_line
from lab.reliability import chaos, fuzz, soak

PAGE = ROOT / "docs" / "reliability.md"

Table = Callable[[Mapping[str, Any]], list[str]]
_TABLES: Mapping[str, tuple[str, Table]] = {
    "fuzz": (fuzz.RESULT, fuzz.table),
    "chaos": (chaos.RESULT, lambda record: chaos.table(record["kinds"])),
    "soak": (soak.RESULT, lambda record: soak.table(record["stretches"])),
}


def options() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} table: begin -->", f"<!-- {name} table: end -->"


def text_of(name: str) -> str:
    """Writes one table and the line of its origin; a line instead if it was not measured yet."""
    result, table = _TABLES[name]
    path = RESULTS / result
    if not path.exists():
        return "Not measured yet.\n"
    record = json.loads(path.read_text(encoding="utf-8"))
    return "\n".join([f"{origin_line(record)}.", "", *table(record), ""])


def write_page(page: Path = PAGE) -> None:
    """Replaces the tables of the page."""
    for name in _TABLES:
        replace_between(page, *marks(name), text_of(name))


if __name__ == "__main__":
    options().parse_args()
    write_page()
    print(f"wrote {PAGE}")
