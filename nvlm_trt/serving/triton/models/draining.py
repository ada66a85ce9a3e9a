"""Refuses new requests once the supervisor says so or has ended, and tells it how far the open ones are."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from nvlm_trt.errors import ServerError
from nvlm_trt.serving.triton import guard
from nvlm_trt.serving.triton.drain_channel import ENCODED, IDLE
from nvlm_trt.serving.triton.models.answer_sender import AnswerSender
from nvlm_trt.serving.triton.process_watch import STUB
from nvlm_trt.serving.triton.server_folder import shm_prefix_of

_POLL_SECONDS = 0.02
_FINISH_SECONDS = 1
_ORPHAN_SECONDS = 30  # for the open requests of a server without a supervisor


def end_server() -> None:
    """Start a guard that ends this process's tritonserver, with its models and files, at once.

    Does nothing in a process that is no model of tritonserver."""
    if not psutil.Process().cmdline()[0].endswith(STUB):
        return
    # tritonserver leads the process group of its models, and its folder is their working directory
    folder = Path.cwd()
    arguments = [str(os.getpgrp()), str(folder), shm_prefix_of(folder)]
    command = [sys.executable or "python3", "-m", guard.__name__, *arguments]
    subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


class Draining:
    """The model's end of a DrainChannel, served by a thread.

    The end of the supervisor also starts the draining, after which this thread ends the server: the guard, which would
    do so at once, may have been killed, too."""

    def __init__(self, descriptor: int, answers: AnswerSender, end_server: Callable[[], None] = end_server) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._answers = answers
        self._end_server = end_server
        self._admitting = threading.Lock()
        self._begun = False
        self._told = threading.Event()
        threading.Thread(target=self._run, name="nvlm-draining", daemon=True).start()

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """Hold the door open for one request. Raises ServerError once the server drains."""
        with self._admitting:
            if self._begun:
                raise ServerError("the server is stopping; send the request to another one")
            yield

    def finish(self) -> None:
        """Tell the supervisor, if it has asked, that no request is open. Call it when that is so."""
        if self._begun:
            self._told.wait(_FINISH_SECONDS)

    def _run(self) -> None:
        told = self._socket.recv(1)
        with self._admitting:
            self._begun = True
        if told:
            with contextlib.suppress(OSError):  # the supervisor has ended
                self._drain()
                self._socket.recv(1)
        deadline = time.monotonic() + _ORPHAN_SECONDS
        while self._answers.open_requests and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        self._end_server()

    def _drain(self) -> None:
        while self._answers.encoding_requests:
            time.sleep(_POLL_SECONDS)
        self._socket.send(ENCODED)
        while self._answers.open_requests:
            time.sleep(_POLL_SECONDS)
        self._socket.send(IDLE)
        self._told.set()
