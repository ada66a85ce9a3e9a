"""Remembers what of an unfinished folder is finished, so that its writer goes on where it was stopped.

The journal is a text file in the folder: a line of JSON that says what is being written, then a line for each thing
that is finished. Finished means that the disk has it: a line follows its data. Every line ends with its checksum, and
nothing is believed from the first line on whose checksum is wrong.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nvlm_trt.engine import JOURNAL


class Journal:
    """An open journal. `done`: what is finished, in the order in which it was."""

    def __init__(self, directory: Path, what: dict[str, Any]) -> None:
        """Read the journal of `directory` if it is about `what`; else `done` is empty."""
        self._path = directory / JOURNAL
        self._head = json.dumps(what, sort_keys=True, allow_nan=False)
        self.done: dict[str, None] = {}
        head, *entries = self._believed() or [""]
        if head == self._head:
            self.done = dict.fromkeys(entries)

    def start(self, anew: bool) -> None:
        """Write what the journal knows, without a damaged line at its end. `anew`: forget what is finished."""
        if anew:
            self.done.clear()
        temporary = self._path.with_suffix(".new")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(_lines([self._head, *self.done]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)

    def add(self, entries: list[str]) -> None:
        """Append what the disk has."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_lines(entries))
            file.flush()
            os.fsync(file.fileno())
        self.done.update(dict.fromkeys(entries))

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def _believed(self) -> list[str]:
        try:
            text = self._path.read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError):
            return []
        believed = []
        for line in text.split("\n")[:-1]:  # a line without an end was cut off
            entry, _, checksum = line.rpartition(" ")
            if checksum != _checksum(entry):
                break
            believed.append(entry)
        return believed


def _lines(entries: Iterable[str]) -> str:
    return "".join(f"{entry} {_checksum(entry)}\n" for entry in entries)


def _checksum(entry: str) -> str:
    return f"{zlib.crc32(entry.encode()):08x}"
