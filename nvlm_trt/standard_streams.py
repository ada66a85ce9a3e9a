"""Tells a standard output that is full or closed from other faults, and keeps closed streams from being reused.

`OutputError` is no OSError: otherwise typer, rich, and code that writes files would take it for an error of theirs.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

_DESCRIPTORS = {"stdin": 0, "stdout": 1, "stderr": 2}


class OutputError(Exception):
    """Standard output cannot be written. `is_pipe`: its reader has left, which is no fault."""

    def __init__(self, error: OSError) -> None:
        self.is_pipe = error.errno == errno.EPIPE
        reason = "it is closed" if error.errno == errno.EBADF else error.strerror
        super().__init__(f"cannot write to standard output ({reason}); send it to a file or a pipe that can be written")


class _StandardOutput(io.FileIO):
    """Raises OutputError once, then drops everything, so that the interpreter's own flush at its end is silent."""

    _failed = False

    def write(self, data: Any) -> int:
        if self._failed:
            return memoryview(data).nbytes
        try:
            return super().write(data)
        except OSError as error:
            self._failed = True
            raise OutputError(error) from error


def prepare() -> None:
    """Make standard output raise OutputError, and replace characters that its encoding lacks.

    Opens closed standard streams: else the next file that is opened would be standard output, for example."""
    _open_closed()
    stdout = sys.stdout
    if stdout is not sys.__stdout__ or type(stdout) is not io.TextIOWrapper:  # a test's
        if isinstance(stdout, io.TextIOWrapper):
            stdout.reconfigure(errors="replace")
        return
    stdout.flush()
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_StandardOutput(stdout.fileno(), "w", closefd=False)),
        encoding=stdout.encoding,
        errors="replace",  # an answer may hold characters that the terminal's encoding lacks
        line_buffering=stdout.line_buffering,
        write_through=stdout.write_through,
    )


def _open_closed() -> None:
    """Open descriptors that were closed when the program started. Writing to stdout then fails; stderr is dropped."""
    for name, descriptor in _DESCRIPTORS.items():
        if getattr(sys, name) is not None or getattr(sys, f"__{name}__") is not None:
            continue
        opened = os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
        if opened != descriptor:
            os.dup2(opened, descriptor)
            os.close(opened)
        if name == "stdin":
            continue
        stream = io.TextIOWrapper(io.FileIO(descriptor, "w", closefd=False), "utf-8", "replace", write_through=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
