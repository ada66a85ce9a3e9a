"""Keeps the JSON file of one run: written after every measurement, resumed by a run of the same origin only."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab.code_state import ROOT
from lab.origin import Origin, origin_line

Record = dict[str, Any]


class RunFile:
    """Keeps the record of one run below --work. Files of other origins and damaged files are set aside, not lost."""

    def __init__(self, path: Path, origin: Origin) -> None:
        self.path = path
        self.origin = origin
        name = _module(Path(sys.argv[0]))
        self.record: Record = {
            "benchmark": name.rpartition(".")[2],
            "command": shlex.join(["python", "-m", name, *sys.argv[1:]]),
            "code": origin.code,
            "machine": origin.machine,
            "versions": origin.versions,
            "settings": origin.settings,
        }

    def add_versions(self, versions: Mapping[str, str]) -> None:
        """Adds to the origin the versions of software and data besides the packages of this environment."""
        self.origin = replace(self.origin, versions={**self.origin.versions, **versions})
        self.record["versions"] = self.origin.versions

    def resume(self, difference: Callable[[Record], str | None], content: Callable[[Record], str]) -> bool:
        """Takes up the earlier record if it has this origin; else sets its file aside. A line on stderr says which.

        `difference` says why a record of this origin cannot be resumed, or None; `content` says what the record holds.
        Both raise ValueError, KeyError, TypeError or AttributeError for a damaged record."""
        if not self.path.exists():
            return False
        try:
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            reason = self.origin.difference(earlier) or difference(earlier)
            line = f"goes on with {self.path}: {content(earlier)}, from {earlier['measured']['first']} on"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"it is damaged ({type(error).__name__})"
        if reason:
            line = f"starts anew, {self.path} is now {set_aside(self.path).name}: {reason}"
        else:
            self.record = earlier
        print(line, file=sys.stderr, flush=True)
        return not reason

    def keep(self, parts: Mapping[str, Any]) -> None:
        """Adds a measurement that ended now, and writes the file."""
        now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        self.record["measured"] = {"first": self.record.get("measured", {}).get("first", now), "last": now}
        self.write(parts)

    def write(self, parts: Mapping[str, Any]) -> None:
        """Replaces `parts` of the record, and the file as a whole."""
        self.record |= parts
        self.copy(self.path)

    def copy(self, path: Path) -> None:
        """Writes the record to `path`, all of it or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(self.record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    def origin_line(self) -> str:
        """Says when, on which machine and with which code the record was measured."""
        return origin_line(self.record)


def _module(script: Path) -> str:
    """Names the module of lab that runs as a script."""
    folder, path = ROOT / "lab", script.resolve()
    inside = path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)
    return ".".join(("lab", *inside.with_suffix("").parts))


def set_aside(path: Path) -> Path:
    """Renames a file to NAME.1.json, or to the first number that is free, and returns the new path."""
    number = 1
    while (aside := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    return path.rename(aside)
