"""Sends all answers on one thread, so that the text generator does not wait for the server."""

from __future__ import annotations

import contextlib
import queue
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from nvlm_trt.api import Delta, merge_deltas
from nvlm_trt.runtime.request import Request, State
from nvlm_trt.serving.triton.models.responses import Responses

# The server is asked this often whether the client of a request without deltas to send (queued, encoding, prefilling)
# is still there.
_POLL_SECONDS = 0.05

# the last event is the n-th delta with a finish_reason, of a request for n answers, or an exception
Event: TypeAlias = Delta | Exception
Submit = Callable[[Callable[[Event], None]], Request]


@dataclass(eq=False)
class _Answer:
    """A request whose answers are not complete. After its submission, only the sender's thread writes to it, but
    another may cancel it."""

    response_sender: Any
    image_bytes: int
    unfinished: int  # of its n answers, by the events that were handled
    token: str | None = None  # by which its client may cancel it
    held: list[Event] | None = None  # the events up to now, if the client gets them all in one response
    request: Request | None = None  # None until the request is submitted: it cannot be cancelled before
    cancelled: bool = False
    asked: float = field(default_factory=time.monotonic)  # when the server was last asked for a cancellation

    def cancel(self) -> None:
        if self.request is not None:
            self.cancelled = True
            self.request.cancel()


class AnswerSender:
    """Sends the deltas and errors of all requests, and cancels the requests whose client has left.

    Sending, and asking whether a client has left, are round trips to the server's process, each with several changes of
    thread. One thread serves all requests: a thread per request woke up after every step, and took the cores from the
    next step half as often again. A client that reads slowly delays no other: the server keeps its responses.
    """

    def __init__(self, pb_utils: Any, responses: Responses, count_late_tokens: Callable[[int], None]) -> None:
        """Start the thread. `count_late_tokens` is called with the number of tokens that are generated for a request
        after its cancellation was noticed."""
        self._pb_utils = pb_utils
        self._responses = responses
        self._count_late_tokens = count_late_tokens
        self._events: queue.SimpleQueue[tuple[_Answer, Event] | None] = queue.SimpleQueue()  # None: the end
        self._open: set[_Answer] = set()
        self._thread = threading.Thread(target=self._run, name="nvlm-answers", daemon=True)
        self._thread.start()

    @property
    def open_requests(self) -> int:
        return len(self._open)

    @property
    def encoding_requests(self) -> int:
        """Count the open requests whose images are still to be encoded."""
        return len(self._encoding())

    @property
    def held_image_bytes(self) -> int:
        """Count the bytes of the images that are still to be encoded."""
        return sum(answer.image_bytes for answer in self._encoding())

    def answer(
        self,
        response_sender: Any,
        submit: Submit,
        stream: bool = True,
        image_bytes: int = 0,
        answers: int = 1,
        token: str | None = None,
    ) -> None:
        """Submit a request by calling `submit`, and send its events through `response_sender`: as they come, or if not
        `stream` in one response. `submit` receives the function to call with each event. The request's images have
        `image_bytes`; it is for `answers` answers, for one unless `stream`. `token` cancels it."""
        answer = _Answer(response_sender, image_bytes, answers, token, None if stream else [])
        self._open.add(answer)
        try:
            answer.request = submit(lambda event: self._put(answer, event))
        except BaseException:
            self._open.discard(answer)
            raise

    def cancel(self, token: str) -> None:
        """Cancel the open requests with this token. Call it on the thread that calls `answer`."""
        for answer in list(self._open):  # a copy: the sender's thread changes the set
            if answer.token is not None and secrets.compare_digest(answer.token, token):
                answer.cancel()

    def close(self) -> None:
        """Send all events that were handed over, then end the thread."""
        self._events.put(None)
        self._thread.join()
        self._responses.close()

    def _encoding(self) -> list[_Answer]:
        answers = list(self._open)  # a copy: other threads change the set
        return [answer for answer in answers if answer.request is None or answer.request.state is State.ENCODING]

    # --- the text generator's thread ---------------------------------------------------------------------------------

    def _put(self, answer: _Answer, event: Event) -> None:
        if answer.cancelled and isinstance(event, Delta):
            self._count_late_tokens(len(event.token_ids))
        self._events.put((answer, event))

    # --- the sender's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        closing = False
        while not closing:
            events, closing = self._collect()
            for answer, of_answer in events.items():
                if answer in self._open:  # else the answer was dropped
                    self._forward(answer, of_answer)
            self._ask_for_idle()

    def _collect(self) -> tuple[dict[_Answer, list[Event]], bool]:
        """Return the new events by request, and whether the sender is closing. Waits _POLL_SECONDS for an event."""
        events: dict[_Answer, list[Event]] = {}
        with contextlib.suppress(queue.Empty):
            item = self._events.get(timeout=_POLL_SECONDS)
            while item is not None:
                answer, event = item
                events.setdefault(answer, []).append(event)
                item = self._events.get_nowait()
            return events, True
        return events, False

    def _forward(self, answer: _Answer, events: list[Event]) -> None:
        """Send the events, unless the client has left.

        A cancelled request ends with the last event of the text generator, when its slot is free."""
        answer.unfinished -= sum(isinstance(event, Delta) and event.finish_reason is not None for event in events)
        ended = isinstance(events[-1], Exception) or not answer.unfinished
        with self._dropping(answer):
            if not self._is_cancelled(answer):
                self._send(answer, events if answer.held is None else _hold(answer.held, events, ended), ended)
            elif ended:
                answer.response_sender.send(flags=self._pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            if ended:
                self._open.discard(answer)

    def _send(self, answer: _Answer, events: list[Event], ended: bool) -> None:
        """Send one response for all deltas of each of the request's answers, then one for the error if there is one.
        Without events, send nothing."""
        final = self._pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        responses = [self._responses.of_delta(delta) for delta in _merged([e for e in events if isinstance(e, Delta)])]
        if events and isinstance(events[-1], Exception):
            responses.append(self._responses.of_error(events[-1]))
        for number, response in enumerate(responses, start=1):
            answer.response_sender.send(response, flags=final if ended and number == len(responses) else 0)

    def _is_cancelled(self, answer: _Answer) -> bool:
        """Ask the server whether the client has cancelled or left. If so, cancel the request. Takes a round trip."""
        answer.asked = time.monotonic()
        if answer.request is not None and not answer.cancelled and answer.response_sender.is_cancelled():
            answer.cancel()
        return answer.cancelled

    def _ask_for_idle(self) -> None:
        """Ask the server which of the requests not asked for lately are cancelled. Stops when there are events."""
        due = time.monotonic() - _POLL_SECONDS
        answers = list(self._open)  # a copy: other threads add to the set
        for answer in sorted(answers, key=lambda answer: answer.asked):
            if answer.asked > due:
                return
            with self._dropping(answer):
                self._is_cancelled(answer)
            if not self._events.empty():
                return

    @contextlib.contextmanager
    def _dropping(self, answer: _Answer) -> Iterator[None]:
        """Drop a request if sending its answer fails. Other requests are not affected."""
        try:
            yield
        except Exception:
            self._open.discard(answer)
            if answer.request is not None:
                answer.request.cancel()
            self._pb_utils.Logger.log_error(f"a request is dropped: {traceback.format_exc()}")


def _merged(deltas: list[Delta]) -> list[Delta]:
    """Join the deltas of each answer. The one that has the last of `deltas` is the last."""
    by_index: dict[int, list[Delta]] = {}
    for delta in deltas:
        by_index[delta.index] = [*by_index.pop(delta.index, ()), delta]
    return [merge_deltas(of_answer) for of_answer in by_index.values()]


def _hold(held: list[Event], events: list[Event], ended: bool) -> list[Event]:
    """Add the events to those held. Return what one response at the end holds: all deltas, or the error alone."""
    held += events
    if not ended:
        return []
    return held[-1:] if isinstance(held[-1], Exception) else held
