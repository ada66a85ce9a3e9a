"""Writes to places in an open file, and brings them to the disk while more is written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from nvlm_trt.closing import ClosedOnExit

_SYNC_BYTES = 256 << 20  # written again at most twice over, after an interruption


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` from byte `offset` of the file on. Raises OSError."""
    view, done = memoryview(data).cast("B"), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)


class BackgroundSync(ClosedOnExit):
    """Brings a file to the disk on a thread of its own, so that the disk does not wait for the conversion of weights,
    nor the conversion for the disk. Tells after each sync how far the file is safe."""

    def __init__(self, descriptor: int, tell: Callable[[str], None]) -> None:
        """`tell` gets a position that `reached` was called with, once the disk has all that was written before. It is
        called on the thread; nothing else may write to the same journal meanwhile."""
        self._descriptor = descriptor
        self._tell = tell
        self._thread = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None
        self._unsynced = 0

    def reached(self, position: str, nbytes: int) -> None:
        """Note that `nbytes` more are written, all before `position`. Raises OSError of an earlier sync."""
        self._unsynced += nbytes
        if self._unsynced >= _SYNC_BYTES:
            self._start(position)

    def finish(self, position: str) -> None:
        """Wait until the disk has everything. Raises OSError."""
        self._start(position)
        self._wait()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a sync that nobody waits for: it told nothing
            self._wait()
        self._thread.shutdown()

    def _start(self, position: str) -> None:
        self._wait()
        self._running, self._unsynced = self._thread.submit(self._sync, position), 0

    def _wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _sync(self, position: str) -> None:
        os.fdatasync(self._descriptor)
        self._tell(position)
