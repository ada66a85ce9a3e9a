"""Counts the tokens of requests that are not to be answered, a few at a time."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from nvlm_trt.api import ChatRequest, PromptCount
from nvlm_trt.errors import QueueFullError
from nvlm_trt.lane import AbandonedError, IsOver
from nvlm_trt.serving.triton.models.responses import Responses

_AT_ONCE = 2
_MOST_WAITING = 64

Count = Callable[[ChatRequest, IsOver], PromptCount]


@dataclass(eq=False)
class _Counted:
    """A request that is not answered yet."""

    response_sender: Any
    chat: ChatRequest
    image_bytes: int
    token: str | None  # by which its client may cancel it
    cancelled: bool = False

    def is_over(self) -> bool:
        return self.cancelled or self.response_sender.is_cancelled()


class Counting:
    """Answers with the number of tokens. Decoding images takes long, so threads of its own do that."""

    def __init__(self, pb_utils: Any, responses: Responses, count: Count) -> None:
        self._final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        self._responses = responses
        self._count = count
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="nvlm-count")
        self._changing = threading.Lock()
        self._open: set[_Counted] = set()

    @property
    def held_image_bytes(self) -> int:
        """Count the bytes of the images of the open requests."""
        with self._changing:
            return sum(counted.image_bytes for counted in self._open)

    def answer(self, response_sender: Any, chat: ChatRequest, image_bytes: int, token: str | None = None) -> None:
        """Count the tokens of `chat`, whose images have `image_bytes`, and send them. `token` cancels it. Raises
        QueueFullError."""
        counted = _Counted(response_sender, chat, image_bytes, token)
        with self._changing:
            if len(self._open) >= _MOST_WAITING:
                raise QueueFullError(f"{len(self._open)} requests wait to be counted; try again later")
            self._open.add(counted)
        self._threads.submit(self._run, counted)

    def cancel(self, token: str) -> None:
        """Cancel the open requests with this token."""
        with self._changing:
            for counted in self._open:
                if counted.token is not None and secrets.compare_digest(counted.token, token):
                    counted.cancelled = True

    def close(self) -> None:
        """Finish the open requests."""
        self._threads.shutdown()

    def _run(self, counted: _Counted) -> None:
        try:
            response = self._responses.of_count(self._count(counted.chat, counted.is_over))
        except AbandonedError:
            response = None
        except Exception as error:
            response = self._responses.of_error(error)
        with self._changing:
            self._open.discard(counted)
        if response is None:
            counted.response_sender.send(flags=self._final)
        else:
            counted.response_sender.send(response, flags=self._final)
