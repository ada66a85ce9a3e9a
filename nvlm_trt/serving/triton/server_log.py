"""Keeps what tritonserver and its models print: a file of bounded size, and the last lines in memory."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

_FILE_BYTES = 8 << 20  # of the file and of the one before it
_BYTES_PER_SECOND = 64 << 10
_BURST_BYTES = 4 << 20
_TAIL_BYTES = 64 << 10
_READ_BYTES = 64 << 10
_SETTLE_SECONDS = 2

_OUT_OF_DESCRIPTORS = b"Too many open files"
_NOISE = re.compile(r"^[|+]|\] $|CUDA|Cuda|NVML|DCGM|inned memory")


class ServerLog:
    """Reads a pipe on a thread until every process that holds its other end has ended.

    Strangers can make the server print without end: it complains 200,000 times a second about a connection that it has
    no descriptor for. So a burst is written whole, and after it only what keeps a rate, so that it does not push older
    lines out of the file. The pipe is always read: a process that prints into a full one would wait."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._tail = b""
        self._out_of_descriptors = False
        self._allowance = float(_BURST_BYTES)
        self._left_out = 0  # bytes since the last that were written
        self._written = 0  # bytes in the file
        self._refilled = clock()
        self._file = path.open("wb", buffering=0)
        self._read_end, self.write_end = os.pipe()
        self._thread = threading.Thread(target=self._run, name="nvlm-server-log", daemon=True)
        self._thread.start()

    def close_write_end(self) -> None:
        """Close this process's copy of the end that the server prints into, once the server has its own."""
        os.close(self.write_end)

    def settle(self) -> None:
        """Wait until everything that an ended server printed is read, or a moment if one of its models still runs."""
        self._thread.join(_SETTLE_SECONDS)

    @property
    def out_of_descriptors(self) -> bool:
        """Whether a process has printed that it may open no more files or connections."""
        return self._out_of_descriptors

    def tail(self, lines: int) -> list[str]:
        """Return the last useful lines: leave out tables and complaints about a missing GPU."""
        text = self._tail.decode(errors="replace")
        return [line for line in text.splitlines() if line.strip() and not _NOISE.search(line)][-lines:]

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with contextlib.closing(self._file), os.fdopen(self._read_end, "rb", buffering=0) as pipe:
            while data := pipe.read(_READ_BYTES):
                recent = self._tail + data
                # the message may be cut in two by the end of a read
                self._out_of_descriptors |= _OUT_OF_DESCRIPTORS in recent[-len(data) - len(_OUT_OF_DESCRIPTORS) :]
                self._tail = recent[-_TAIL_BYTES:]
                with contextlib.suppress(OSError):  # a full disk, or a folder that somebody removed
                    self._write(data)

    def _write(self, data: bytes) -> None:
        now = self._clock()
        self._allowance = min(_BURST_BYTES, self._allowance + (now - self._refilled) * _BYTES_PER_SECOND)
        self._refilled = now
        if len(data) > self._allowance:
            self._left_out += len(data)
            return
        self._allowance -= len(data)
        if self._left_out:
            data = b"\n[%d bytes were left out here: more than the log takes]\n" % self._left_out + data
            self._left_out = 0
        if self._written + len(data) > _FILE_BYTES:
            self._rotate()
        self._written += len(data)
        self._file.write(data)

    def _rotate(self) -> None:
        os.replace(self._path, self._path.with_name(self._path.name + ".1"))
        self._file.close()
        self._file = self._path.open("wb", buffering=0)
        self._written = 0
