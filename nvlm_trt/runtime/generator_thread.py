"""Runs the steps of a text generator on one thread, which sleeps while there is no work."""

from __future__ import annotations

import logging
import threading
from typing import Protocol

from nvlm_trt.errors import EngineError
from nvlm_trt.runtime.request import Request
from nvlm_trt.runtime.text_generator import GeneratorMetrics

logger = logging.getLogger(__name__)


class Steps(Protocol):
    """Decides what an engine does next. `enqueue` and `metrics` are thread-safe; one thread calls the rest."""

    def enqueue(self, request: Request) -> None:
        """Queue a request. Raises QueueFullError."""
        ...

    @property
    def is_empty(self) -> bool:
        """Return whether every request has ended."""
        ...

    @property
    def has_work(self) -> bool:
        """Return whether `step` would do anything. It does nothing while all requests wait for their images."""
        ...

    def step(self) -> None: ...

    def cancel_all(self) -> None:
        """Cancel every request: they end with the next step."""
        ...

    def fail_all(self, error: Exception) -> None:
        """End every request with an error, without calling the engine."""
        ...

    def metrics(self) -> GeneratorMetrics: ...


class GeneratorThread:
    """The part of `TextGenerator` that all text generators share: submission, failure, the end."""

    def __init__(self, steps: Steps, name: str) -> None:
        """Start the thread `name`."""
        self._steps = steps
        # guards the three fields below, and the check at the end that the queue is empty
        self._changed = threading.Condition()
        self._closing = False
        self._aborting = False
        self._failure: EngineError | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """See `TextGenerator.submit`."""
        with self._changed:
            if self._failure:
                raise self._failure
            if self._closing:
                raise EngineError("the engine is closed; open it again to submit requests")
            request.submitted_to(self._wake)
            self._steps.enqueue(request)
        self._wake()

    @property
    def healthy(self) -> bool:
        """Return False once the engine has failed: all requests ended with an error, and new ones are refused."""
        return self._failure is None

    def metrics(self) -> GeneratorMetrics:
        return self._steps.metrics()

    def finish(self, drain: bool = True) -> None:
        """See `TextGenerator.finish`."""
        with self._changed:
            self._closing = True
            self._aborting = self._aborting or not drain
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._steps.step()
        except Exception as error:
            logger.exception("the engine failed")
            with self._changed:
                self._failure = EngineError(f"the engine failed ({error or type(error).__name__}); restart it")
            self._steps.fail_all(self._failure)

    def _wait_for_work(self) -> bool:
        """Sleep until there is work. Return False once the generator is closing and all work is done."""
        with self._changed:
            while True:
                if self._aborting:
                    self._steps.cancel_all()
                if self._steps.has_work:
                    return True
                if self._closing and self._steps.is_empty:
                    return False
                self._changed.wait()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
