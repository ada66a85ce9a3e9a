"""The thread that runs the engine: it sleeps while there is nothing to do and ends all requests if the engine fails."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future

from nvlm_trt.backends.base import Backend
from nvlm_trt.errors import EngineError
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.generation import GenerationRequest, Handle, OnDelta, OnError, Submission
from nvlm_trt.runtime.scheduler import Scheduler, SchedulerMetrics

logger = logging.getLogger(__name__)


class Batcher:
    """Drives one backend. `on_delta` and `on_error` are called on its thread, between two steps: they must be quick."""

    def __init__(self, backend: Backend, tokenizer: Tokenizer, max_queue: int = 64, prefill_chunk: int = 256) -> None:
        """At most `max_queue` requests wait for a slot; decoding waits for at most `prefill_chunk` prompt tokens."""
        self._scheduler = Scheduler(backend, tokenizer, max_queue, prefill_chunk)
        self._changed = threading.Condition()  # guards the three fields below and the queue's being empty at the end
        self._closing = False
        self._aborting = False
        self._failure: EngineError | None = None
        self._thread = threading.Thread(target=self._run, name="nvlm-batcher", daemon=True)
        self._thread.start()

    def submit(
        self,
        request: GenerationRequest | Future[GenerationRequest],
        on_delta: OnDelta,
        on_error: OnError,
        request_id: str | None = None,
    ) -> Handle:
        """Queue a request, or the future of one whose images are being encoded; its prompt leaves room for an answer.

        `on_delta` is called until a delta has a finish_reason, unless `on_error` is: once, and last. Slots are given
        in the order of submission to requests that are ready. A future is cancelled with its request.
        Raises QueueFullError, and EngineError after `close` or a failure of the engine.
        """
        submission = Submission(_as_future(request), on_delta, on_error, Handle(self._wake, request_id))
        with self._changed:
            if self._failure:
                raise self._failure
            if self._closing:
                raise EngineError("the engine is closed; open it again to submit requests")
            self._scheduler.enqueue(submission)
        submission.prepared.add_done_callback(lambda _: self._wake())
        return submission.handle

    @property
    def healthy(self) -> bool:
        """False once the engine has failed: every request was told, and no new one is accepted."""
        return self._failure is None

    def metrics(self) -> SchedulerMetrics:
        return self._scheduler.metrics()

    def close(self, drain: bool = True) -> None:
        """Accept nothing more; finish what was submitted, or cancel it unless `drain`; return when that is done."""
        with self._changed:
            self._closing = True
            self._aborting = self._aborting or not drain
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._scheduler.step()
        except Exception as error:
            logger.exception("the engine failed")
            with self._changed:
                self._failure = EngineError(f"the engine failed ({error or type(error).__name__}); restart it")
            self._scheduler.fail_all(self._failure)

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False once closed and done."""
        with self._changed:
            while True:
                if self._aborting:
                    self._scheduler.cancel_all()
                if self._scheduler.has_work:
                    return True
                if self._closing and self._scheduler.is_empty:
                    return False
                self._changed.wait()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _as_future(request: GenerationRequest | Future[GenerationRequest]) -> Future[GenerationRequest]:
    if isinstance(request, Future):
        return request
    future: Future[GenerationRequest] = Future()
    future.set_result(request)
    return future
