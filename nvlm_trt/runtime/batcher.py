"""Makes a text generator of a step backend: one thread runs the engine, and sleeps while there is no work."""

from __future__ import annotations

import logging
import threading
from typing import Any

from nvlm_trt.backends.base import BackendArray, FloatArray, ImageFeatures, StepBackend
from nvlm_trt.errors import EngineError
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.request import Request
from nvlm_trt.runtime.scheduler import Scheduler
from nvlm_trt.runtime.text_generator import GeneratorMetrics

logger = logging.getLogger(__name__)


class Batcher:
    """Implements `TextGenerator`. Calls `on_delta` and `on_error` on the batcher's thread, between two steps."""

    def __init__(
        self, backend: StepBackend, tokenizer: Tokenizer, max_queue: int = 64, prefill_chunk: int = 256
    ) -> None:
        """Take over `backend`. At most `max_queue` requests wait for a slot; at most `prefill_chunk` prompt tokens run
        between two decoding steps."""
        self._backend = backend
        self._scheduler = Scheduler(backend, tokenizer, max_queue, prefill_chunk)
        # guards the three fields below, and the check at the end that the queue is empty
        self._changed = threading.Condition()
        self._closing = False
        self._aborting = False
        self._failure: EngineError | None = None
        self._thread = threading.Thread(target=self._run, name="nvlm-batcher", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """See `TextGenerator.submit`."""
        with self._changed:
            if self._failure:
                raise self._failure
            if self._closing:
                raise EngineError("the engine is closed; open it again to submit requests")
            request.submitted_to(self._wake)
            self._scheduler.enqueue(request)
        self._wake()

    def encode(self, pixel_values: FloatArray) -> BackendArray:
        return self._backend.encode(pixel_values)

    def import_tokens(self, tokens: Any) -> BackendArray:
        return self._backend.import_tokens(tokens)

    def features(self, image_tokens: BackendArray) -> ImageFeatures:
        return self._backend.features(image_tokens)

    @property
    def healthy(self) -> bool:
        """Return False once the engine has failed: all requests ended with an error, and new ones are refused."""
        return self._failure is None

    def metrics(self) -> GeneratorMetrics:
        return self._scheduler.metrics()

    def finish(self, drain: bool = True) -> None:
        """See `TextGenerator.finish`."""
        with self._changed:
            self._closing = True
            self._aborting = self._aborting or not drain
            self._changed.notify_all()
        self._thread.join()

    def close(self, drain: bool = True) -> None:
        """See `TextGenerator.close`."""
        self.finish(drain)
        self._backend.close()

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
        """Sleep until there is work. Return False once the batcher is closing and all work is done."""
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
