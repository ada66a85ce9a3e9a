"""Does to the product what happens to software, one kind at a time, and checks what the product promises then.

    python -m lab.reliability.chaos --work WORK
    python -m lab.reliability.chaos --work WORK --only "guard killed" --only "a port in use"

Each kind has its own server or build, and afterwards no process, temporary file or shared memory of it may be left. The
run writes its results after every kind, and the same command goes on with the kinds that are left. --only repeats its
kinds. Exit status 1: a promise was broken.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.engines import random_checkpoint
from lab.reliability.course import Verdict, never_differs, parser, run, say, served_engine
from lab.reliability.kind import Kind
from lab.reliability.kinds.all_kinds import all_kinds
from lab.reliability.place import Place
from lab.reliability.promise import BrokenPromise, NotHere
from lab.run_file import RunFile
from nvlm_trt.errors import NvlmError

RESULT = "reliability_chaos.json"
HELD, BROKEN, NOT_HERE = "yes", "no", "not run"

Row = dict[str, Any]


def options() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("--only", action="append", default=[], metavar="NAME", help="run this kind; may be repeated")
    made.add_argument("--list", action="store_true", help="print the names of all kinds, and stop")
    made.add_argument("--seconds", type=float, default=7200, help="starts no other kind after these seconds")
    return made


def measure(arguments: argparse.Namespace, file: RunFile) -> Verdict:
    """Runs the kinds that are left."""
    kinds = all_kinds()
    if arguments.list:
        print(*kinds, sep="\n")
        return Verdict(missing=["a list is not published"])
    wanted = chosen(kinds, arguments.only)
    rows: list[Row] = []
    if file.resume(never_differs, lambda record: f"{len(record['kinds'])} of {len(kinds)} kinds were run"):
        rows = file.record["kinds"]
    deadline = time.monotonic() + arguments.seconds
    engine, checkpoint = served_engine(arguments), random_checkpoint(arguments.work, arguments.preset)
    for each in wanted:
        if time.monotonic() < deadline and (arguments.only or each.name not in {row["kind"] for row in rows}):
            row = run_kind(each, lambda: Place(_emptied(arguments.work / "chaos"), engine, checkpoint))
            rows = in_order([*(other for other in rows if other["kind"] != each.name), row], list(kinds))
            file.keep({"kinds": rows})
    print(*table(rows), sep="\n")
    done = {row["kind"] for row in rows}
    faults = [f"{row['kind']}: {row['seen']}" for row in rows if row["held"] == BROKEN]
    missing = [f"{len(kinds.keys() - done)} kinds were not run"] if kinds.keys() - done else []
    return Verdict(missing, faults)


def chosen(kinds: Mapping[str, Kind], names: Sequence[str]) -> list[Kind]:
    """Returns the named kinds, or all. Raises NvlmError for a name that is none."""
    unknown = [name for name in names if name not in kinds]
    if unknown:
        raise NvlmError(f"--only {unknown[0]!r} is no kind; --list prints their names")
    return [kinds[name] for name in names] if names else list(kinds.values())


def run_kind(each: Kind, place_of: Callable[[], Place]) -> Row:
    """Brings one kind about. Returns the row of the table: kind, promise, whether it held, what was seen, seconds."""
    say(f"{each.name} ...")
    started = time.monotonic()
    place = place_of()
    held, seen = HELD, ""
    try:
        each.check(place)
        place.check_left()
    except NotHere as reason:
        held, seen = NOT_HERE, str(reason)
    except BrokenPromise as broken:
        held, seen = BROKEN, str(broken)
    except Exception as error:  # the client's, for example: no promise names it
        held, seen = BROKEN, f"{type(error).__name__}: {' '.join(str(error).split())}"
    finally:
        place.close()
    seconds = round(time.monotonic() - started, 1)
    say(f"{each.name}: {held} ({seconds} s) {seen}".rstrip())
    return {"kind": each.name, "promise": each.promise, "held": held, "seen": seen, "seconds": seconds}


def in_order(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Sorts rows as the kinds are listed; drops rows of kinds that are gone."""
    return sorted((row for row in rows if row["kind"] in names), key=lambda row: names.index(row["kind"]))


def table(rows: Sequence[Row]) -> list[str]:
    """Writes the table of the page."""
    lines = ["| what happens | promise | held | s |", "|---|---|---|---|"]
    for row in rows:
        seen = f": {_cell(row['seen'])}" if row["seen"] else ""
        lines.append(f"| {_cell(row['kind'])} | {_cell(row['promise'])} | {row['held']}{seen} | {row['seconds']:.0f} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    run(options(), measure, RESULT)
