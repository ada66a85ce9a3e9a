"""Counts the tokens of requests that are not to be answered, a few at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nvlm_trt.api import ChatRequest, PromptCount
from nvlm_trt.errors import QueueFullError
from nvlm_trt.lane import AbandonedError, IsOver
from nvlm_trt.serving.triton.models.responses import Responses

_AT_ONCE = 2
_MOST_WAITING = 64

Count = Callable[[ChatRequest, IsOver], PromptCount]


class Counting:
    """Answers with the number of tokens. Decoding images takes long, so threads of its own do that."""

    def __init__(self, pb_utils: Any, responses: Responses, count: Count) -> None:
        self._final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        self._responses = responses
        self._count = count
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="nvlm-count")
        self._changing = threading.Lock()
        self._open = 0
        self.held_image_bytes = 0  # of the requests that are open

    def answer(self, response_sender: Any, chat: ChatRequest, image_bytes: int) -> None:
        """Count the tokens of `chat`, whose images have `image_bytes`, and send them. Raises QueueFullError."""
        with self._changing:
            if self._open >= _MOST_WAITING:
                raise QueueFullError(f"{self._open} requests wait to be counted; try again later")
            self._open += 1
            self.held_image_bytes += image_bytes
        self._threads.submit(self._run, response_sender, chat, image_bytes)

    def close(self) -> None:
        """Finish the open requests."""
        self._threads.shutdown()

    def _run(self, response_sender: Any, chat: ChatRequest, image_bytes: int) -> None:
        try:
            response = self._responses.of_count(self._count(chat, response_sender.is_cancelled))
        except AbandonedError:
            response = None
        except Exception as error:
            response = self._responses.of_error(error)
        with self._changing:
            self._open -= 1
            self.held_image_bytes -= image_bytes
        if response is None:
            response_sender.send(flags=self._final)
        else:
            response_sender.send(response, flags=self._final)
