"""Remembers which tensors of an unfinished checkpoint are whole, so that the writer goes on where it was stopped.

The journal is a text file beside the ranks' files: a line of JSON that says what is being written, then the name of
every finished tensor on a line of its own. Finished means that the disk has it: a name follows its data.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

JOURNAL: Final = "unfinished.journal"


class Journal:
    """An open journal. `done`: the tensors that are finished."""

    def __init__(self, directory: Path, what: dict[str, Any]) -> None:
        """Read the journal of `directory` if it is about `what`; else `done` is empty."""
        self._path = directory / JOURNAL
        self._head = json.dumps(what, sort_keys=True, allow_nan=False)
        self.done: set[str] = set()
        head, *names = self._whole_lines() or [""]
        if head == self._head:
            self.done.update(names)

    def start(self, anew: bool) -> None:
        """Write what the journal knows, without a half-written line at its end. `anew`: forget what is finished."""
        if anew:
            self.done.clear()
        temporary = self._path.with_suffix(".new")
        lines = [self._head, *sorted(self.done)]
        with temporary.open("w", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)

    def add(self, names: list[str]) -> None:
        """Append tensors that the disk has."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{name}\n" for name in names))
            file.flush()
            os.fsync(file.fileno())
        self.done.update(names)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def _whole_lines(self) -> list[str]:
        try:
            text = self._path.read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError):
            return []
        return text.split("\n")[:-1]  # a line without an end was cut off
