"""The thread that sends all answers: the batcher must not wait for the server."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import triton_python_backend_utils as pb_utils
from answer_stream import AnswerStream, Event
from response_tensors import ResponseTensors

from nvlm_trt.runtime.generation import Handle

# How often requests that have nothing to send (queued, encoding, prefilling) are asked for: is the client still there?
_POLL_SECONDS = 0.05


class AnswerSender:
    """Sends what the batcher hands over and tells it which requests are cancelled.

    Both are round trips to the server's process, each with several changes of thread. One thread for all requests: one
    for each woke up together after every step, and took the cores from the next one half as often again. A client that
    reads slowly holds up nobody: the server keeps its responses.
    """

    def __init__(self, count_late_tokens: Callable[[int], None]) -> None:
        """`count_late_tokens` is told of tokens made after a cancel was noticed."""
        self._count_late_tokens = count_late_tokens
        self._events: queue.SimpleQueue[tuple[AnswerStream, Event] | None] = queue.SimpleQueue()  # None: the end
        self._tensors = ResponseTensors()
        self._open: set[AnswerStream] = set()
        self._thread = threading.Thread(target=self._run, name="nvlm-answers", daemon=True)
        self._thread.start()

    @property
    def open_requests(self) -> int:
        return len(self._open)

    def answer(self, response_sender: Any, submit: Callable[[Callable[[Event], None]], Handle]) -> None:
        """Send through `response_sender` what the request that `submit` submits hands to its argument."""
        stream = AnswerStream(response_sender, self._tensors, self._enqueue, self._count_late_tokens)
        self._open.add(stream)
        try:
            stream.handle = submit(stream.put)
        except BaseException:
            self._open.discard(stream)
            raise

    def close(self) -> None:
        """Return when everything is sent that was handed over before."""
        self._events.put(None)
        self._thread.join()
        self._tensors.close()

    def _enqueue(self, stream: AnswerStream, event: Event) -> None:
        self._events.put((stream, event))

    def _run(self) -> None:
        closing = False
        while not closing:
            events, closing = self._collect()
            for stream, of_stream in events.items():
                self._forward(stream, of_stream)
            self._ask_for_idle()

    def _collect(self) -> tuple[dict[AnswerStream, list[Event]], bool]:
        """Everything handed over since, by request, and whether it is the last; nothing if nothing comes for long."""
        events: dict[AnswerStream, list[Event]] = {}
        with contextlib.suppress(queue.Empty):
            item = self._events.get(timeout=_POLL_SECONDS)
            while item is not None:
                stream, event = item
                events.setdefault(stream, []).append(event)
                item = self._events.get_nowait()
            return events, True
        return events, False

    def _forward(self, stream: AnswerStream, events: list[Event]) -> None:
        if stream not in self._open:
            return  # dropped
        with self._dropping(stream):
            if stream.forward(events):
                self._open.discard(stream)

    def _ask_for_idle(self) -> None:
        """Ask for requests that were not asked for lately, but send first what there is to send."""
        due = time.monotonic() - _POLL_SECONDS
        streams = list(self._open)  # others add to the set
        for stream in sorted(streams, key=lambda stream: stream.asked):
            if stream.asked > due:
                return
            with self._dropping(stream):
                stream.is_cancelled()
            if not self._events.empty():
                return

    @contextlib.contextmanager
    def _dropping(self, stream: AnswerStream) -> Iterator[None]:
        """A request whose answer cannot be sent ends; the others go on."""
        try:
            yield
        except Exception:
            self._open.discard(stream)
            if stream.handle is not None:
                stream.handle.cancel()
            pb_utils.Logger.log_error(f"a request is dropped: {traceback.format_exc()}")
