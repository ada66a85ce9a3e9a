"""Holds the owner's end of one decoding worker."""

from __future__ import annotations

import json
import os
import select
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from nvlm_trt.errors import EngineError
from nvlm_trt.image.decoding_worker import MESSAGE_BYTES, write_whole
from nvlm_trt.image.fork_server import FORK_SERVER

_START_SECONDS = 60
_KEPT_BYTES = 32 << 20  # a larger mailbox gives its memory back after the image


class WorkerError(Exception):
    """Says that a worker has ended in the middle of a job. `signal` is 0 if no signal is known to have ended it."""

    def __init__(self, status: int | None) -> None:
        super().__init__(f"status {status}")
        self.signal = -min(status or 0, 0)


class DecodingProcess:
    """One worker. `close` ends it, whatever it does."""

    def __init__(self) -> None:
        """Start a worker. Raises EngineError."""
        self._owner = os.getpid()
        self._mailbox = os.memfd_create("nvlm-image")
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                FORK_SERVER.fork(theirs, self._mailbox)
            self._process = psutil.Process(self._first_message()["pid"])
        except BaseException:
            self.close()
            raise

    def _first_message(self) -> dict[str, Any]:
        try:
            message = self.reply(_START_SECONDS)
        except WorkerError:
            raise EngineError("the process that decodes images ended at its start; see its message above") from None
        if message is None:
            raise EngineError(f"the process that decodes images did not start in {_START_SECONDS} s; try again")
        return message

    @property
    def is_idle(self) -> bool:
        """Return whether the worker can do a job: False if it has ended, or belongs to the process before a fork."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return self._owner == os.getpid() and not poll.poll(0)

    def start(self, job: Mapping[str, Any], data: bytes) -> None:
        """Begin a job. The worker must be idle. Raises WorkerError."""
        write_whole(self._mailbox, data)
        try:
            self._socket.send(json.dumps({**job, "bytes": len(data)}).encode())
        except OSError:
            raise WorkerError(None) from None

    def reply(self, seconds: float) -> dict[str, Any] | None:
        """Wait for the reply to a job; return None if it does not come within `seconds`. Raises WorkerError."""
        self._socket.settimeout(seconds)
        try:
            message = self._socket.recv(MESSAGE_BYTES)
        except TimeoutError:
            return None
        except OSError:
            raise WorkerError(None) from None
        reply = json.loads(message) if message else {"status": None}
        if "status" in reply:
            raise WorkerError(reply["status"])
        return reply

    def pixels(self, shape: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Copy the pixels of the last job out of the mailbox."""
        pixels = np.empty(shape, np.uint8)
        view = pixels.reshape(-1).data
        done = 0
        while done < len(view):
            count = os.preadv(self._mailbox, [view[done:]], done)
            if not count:
                raise WorkerError(None)
            done += count
        if os.fstat(self._mailbox).st_size > _KEPT_BYTES:
            os.ftruncate(self._mailbox, 0)
        return pixels

    def cpu_seconds(self) -> float:
        """Return the CPU time that the worker has used since its start."""
        try:
            times = self._process.cpu_times()
        except psutil.Error:  # it has just ended, which `reply` reports
            return 0
        return times.user + times.system

    def lower_priority(self, nice: int) -> None:
        """Make the worker yield to other processes, for good."""
        try:
            self._process.nice(nice)
        except psutil.Error:
            return

    def close(self) -> None:
        """End the worker."""
        self._socket.close()
        if self._mailbox >= 0:
            os.close(self._mailbox)
        self._mailbox = -1
