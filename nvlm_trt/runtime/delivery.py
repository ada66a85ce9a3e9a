"""Tells callers how their requests go, and counts what was told."""

from __future__ import annotations

import logging

from nvlm_trt.api import Delta
from nvlm_trt.runtime.request import Request
from nvlm_trt.runtime.request_queue import RequestQueue

logger = logging.getLogger(__name__)


class Delivery:
    """Calls `on_delta` and `on_error` of the requests of one text generator. An error in a callback ends only its own
    request."""

    def __init__(self) -> None:
        self.tokens_generated = 0
        self.finished = dict.fromkeys(("stop", "length", "cancelled", "error"), 0)

    def show(self, request: Request, delta: Delta) -> Exception | None:
        """Deliver a delta that is not the request's last. Return the error of `on_delta`: then the request is to be
        dropped."""
        self.tokens_generated += len(delta.token_ids)
        try:
            request.on_delta(delta)
        except Exception as error:
            logger.exception("request %s is dropped: its on_delta raised", request.request_id)
            return error
        return None

    def complete(self, request: Request, delta: Delta) -> None:
        """End a request with its last delta."""
        assert delta.finish_reason
        request.end()
        self.tokens_generated += len(delta.token_ids)
        self.finished[delta.finish_reason] += 1
        try:
            request.on_delta(delta)
        except Exception:
            logger.exception("request %s: on_delta raised at its end", request.request_id)

    def cancel(self, request: Request) -> None:
        """End a request that was cancelled, with a last delta for each answer that has not ended."""
        *others, last = request.cancelled_deltas()
        for delta in others:
            if error := self.show(request, delta):
                self.fail(request, error)
                return
        self.complete(request, last)

    def fail(self, request: Request, error: Exception) -> None:
        """End a request with an error."""
        request.end()
        self.finished["error"] += 1
        try:
            request.on_error(error)
        except Exception:
            logger.exception("request %s: on_error raised when told: %s", request.request_id, error)

    def drop_ended(self, queue: RequestQueue) -> None:
        """End the waiting requests that were cancelled, and those whose images could not be encoded."""
        for request in queue.take_all(lambda waiting: waiting.cancelled):
            self.cancel(request)
        for request in queue.take_all(lambda waiting: waiting.failure is not None):
            assert request.failure is not None
            self.fail(request, request.failure)
