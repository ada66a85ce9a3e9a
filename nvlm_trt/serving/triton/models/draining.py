"""Refuses new requests once the supervisor says so, and tells it how far the open ones are."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

from nvlm_trt.errors import ServerError
from nvlm_trt.serving.triton.drain_channel import ENCODED, IDLE
from nvlm_trt.serving.triton.models.answer_sender import AnswerSender

_POLL_SECONDS = 0.02
_FINISH_SECONDS = 1


class Draining:
    """The model's end of a DrainChannel, served by a thread. The end of the supervisor also starts the draining."""

    def __init__(self, descriptor: int, answers: AnswerSender) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._answers = answers
        self._admitting = threading.Lock()
        self._begun = False
        self._thread = threading.Thread(target=self._run, name="nvlm-draining", daemon=True)
        self._thread.start()

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
            self._thread.join(_FINISH_SECONDS)

    def _run(self) -> None:
        self._socket.recv(1)
        with self._admitting:
            self._begun = True
        with contextlib.suppress(OSError):  # the supervisor has ended
            while self._answers.encoding_requests:
                time.sleep(_POLL_SECONDS)
            self._socket.send(ENCODED)
            while self._answers.open_requests:
                time.sleep(_POLL_SECONDS)
            self._socket.send(IDLE)
