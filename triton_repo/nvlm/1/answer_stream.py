"""One request's way back to its client: deltas out, cancellation in."""

from __future__ import annotations

import contextlib
import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import triton_python_backend_utils as pb_utils
from error_response import error_response

from nvlm_trt.runtime.generation import Delta, Handle
from nvlm_trt.serving.wire import encode_delta, merge_deltas

# How often a request that has nothing to send yet (queued, encoding, prefilling) asks whether its client is gone.
_POLL_SECONDS = 0.05

Event: TypeAlias = Delta | Exception  # a delta with a finish_reason or an exception is the last


class AnswerStream:
    """Sends what the batcher hands over, on a thread of its own: a slow client must not hold up the batcher.

    Asking the server whether a request is cancelled is a round trip between processes. It is done on this thread too,
    once before every response.
    """

    def __init__(
        self, sender: Any, on_end: Callable[[AnswerStream], None], on_late_tokens: Callable[[int], None]
    ) -> None:
        """`sender` is the request's InferenceResponseSender; `on_late_tokens` is told of tokens after a cancel."""
        self._sender = sender
        self._on_end = on_end
        self._on_late_tokens = on_late_tokens
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, event: Event) -> None:
        """Returns at once."""
        self._events.put(event)

    def start(self, handle: Handle) -> None:
        """Send events until the last one; `handle` is cancelled when the client cancels or vanishes."""
        self._thread = threading.Thread(target=self._run, args=(handle,), name="nvlm-answer", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _run(self, handle: Handle) -> None:
        try:
            self._forward(handle)
        except Exception:
            handle.cancel()
            pb_utils.Logger.log_error(f"request {handle.request_id!r} is dropped: {traceback.format_exc()}")
        finally:
            self._on_end(self)

    def _forward(self, handle: Handle) -> None:
        events = self._next_events()
        while not self._sender.is_cancelled():
            self._send(events)
            if _has_ended(events):
                return
            events = self._next_events()
        handle.cancel()
        # tokens made while the server was being asked are not late
        self._discard([*events, *self._queued_events()])

    def _discard(self, events: Sequence[Event]) -> None:
        """Nobody listens any more: wait until the request's slot is free, then tell the server that it has ended."""
        while not _has_ended(events):
            events = self._next_events()
            self._on_late_tokens(sum(len(event.token_ids) for event in events if isinstance(event, Delta)))
        self._sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _send(self, events: Sequence[Event]) -> None:
        """One response for all deltas there are, and the error if there is one."""
        deltas = [event for event in events if isinstance(event, Delta)]
        if deltas:
            delta = merge_deltas(deltas)
            tensors = [pb_utils.Tensor(name, array) for name, array in encode_delta(delta).items()]
            self._sender.send(
                pb_utils.InferenceResponse(tensors),
                flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if delta.finish_reason else 0,
            )
        if events and isinstance(events[-1], Exception):
            self._sender.send(error_response(events[-1]), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _next_events(self) -> list[Event]:
        """All there are; none if the poll interval passes without one."""
        try:
            return [self._events.get(timeout=_POLL_SECONDS), *self._queued_events()]
        except queue.Empty:
            return []

    def _queued_events(self) -> list[Event]:
        events: list[Event] = []
        with contextlib.suppress(queue.Empty):
            while True:
                events.append(self._events.get_nowait())
        return events


def _has_ended(events: Sequence[Event]) -> bool:
    return bool(events) and (isinstance(events[-1], Exception) or events[-1].finish_reason is not None)
