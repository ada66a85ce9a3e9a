"""One request's way back to its client: deltas out, cancellation in."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import triton_python_backend_utils as pb_utils
from error_response import error_response
from response_tensors import ResponseTensors

from nvlm_trt.runtime.generation import Delta, Handle
from nvlm_trt.serving.chat_tensors import merge_deltas

Event: TypeAlias = Delta | Exception  # a delta with a finish_reason or an exception is the last


class AnswerStream:
    """`put` is called by the batcher; everything else by the sender's thread alone."""

    def __init__(
        self,
        response_sender: Any,
        tensors: ResponseTensors,
        enqueue: Callable[[AnswerStream, Event], None],
        count_late: Callable[[int], None],
    ) -> None:
        """`enqueue` hands an event to the sender's thread; `count_late` is told of tokens made after a cancel."""
        self.handle: Handle | None = None  # set once the request is submitted; until then nobody can cancel it
        self.asked = time.monotonic()  # when the server was last asked whether the request is cancelled
        self._response_sender = response_sender
        self._tensors = tensors
        self._enqueue = enqueue
        self._count_late = count_late
        self._cancelled = False

    def put(self, event: Event) -> None:
        """Returns at once."""
        if self._cancelled and isinstance(event, Delta):
            self._count_late(len(event.token_ids))
        self._enqueue(self, event)

    def forward(self, events: Sequence[Event]) -> bool:
        """Send them, if the client still listens; True after the last one: the request has ended.

        A cancelled request ends when the batcher says so: then its slot is free."""
        ended = _has_ended(events)
        if not self.is_cancelled():
            self._send(events)
        elif ended:
            self._response_sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return ended

    def is_cancelled(self) -> bool:
        """Whether the client has cancelled or vanished; the batcher then learns it. A round trip to the server."""
        self.asked = time.monotonic()
        if self.handle is not None and not self._cancelled and self._response_sender.is_cancelled():
            self._cancelled = True
            self.handle.cancel()
        return self._cancelled

    def _send(self, events: Sequence[Event]) -> None:
        """One response for all deltas there are, and the error if there is one."""
        deltas = [event for event in events if isinstance(event, Delta)]
        if deltas:
            delta = merge_deltas(deltas)
            self._response_sender.send(
                pb_utils.InferenceResponse(self._tensors.of(delta)),
                flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if delta.finish_reason else 0,
            )
        if isinstance(events[-1], Exception):
            self._response_sender.send(error_response(events[-1]), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _has_ended(events: Sequence[Event]) -> bool:
    return isinstance(events[-1], Exception) or events[-1].finish_reason is not None
