"""Answers from an engine in this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

from nvlm_trt.api import ChatRequest, Delta, PromptCount
from nvlm_trt.engine import Engine
from nvlm_trt.errors import QueueFullError
from nvlm_trt.runtime.pipeline import Pipeline
from nvlm_trt.runtime.request import Request
from nvlm_trt.serving.gateway.source import ServedModel
from nvlm_trt.serving.served_record import ServedRecord

_Put = Callable[[Delta | Exception], None]

_MOST_COUNTS = 64  # that wait for their turn
_THREADS = 4  # for submitting, which tokenises, and for counting


class PipelineSource:
    """Implements `ChatSource` with a pipeline, which its owner closes."""

    def __init__(self, engine: Engine, pipeline: Pipeline) -> None:
        self.model = ServedModel.of(ServedRecord.of(engine))
        self._pipeline = pipeline
        self._submitting = ThreadPoolExecutor(_THREADS, thread_name_prefix="nvlm-submit")
        self._counting = ThreadPoolExecutor(_THREADS, thread_name_prefix="nvlm-count")
        self._counts = 0

    async def stream(self, chat: ChatRequest, request_id: str) -> AsyncGenerator[Delta, None]:
        """See `ChatSource.stream`."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Delta | Exception] = asyncio.Queue()

        def put(event: Delta | Exception) -> None:
            """Hand an event from the generator's thread to the loop."""
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for the event
                loop.call_soon_threadsafe(events.put_nowait, event)

        unfinished = chat.sampling.n
        request = await self._submit(chat, put, request_id)
        del chat  # its images take memory until the answer ends
        try:
            while unfinished:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                unfinished -= event.finish_reason is not None
                yield event
        finally:
            request.cancel()

    async def count(self, chat: ChatRequest, request_id: str) -> PromptCount:
        """See `ChatSource.count`."""
        if self._counts >= _MOST_COUNTS:
            raise QueueFullError(f"{self._counts} requests wait to be counted; try again later")
        self._counts += 1
        over = Event()
        try:
            counting = self._counting.submit(self._pipeline.count, chat, over.is_set)
            return await asyncio.wrap_future(counting)
        finally:
            over.set()
            self._counts -= 1

    async def ready(self) -> bool:
        return self._pipeline.healthy

    async def close(self) -> None:
        self._submitting.shutdown(wait=False)
        self._counting.shutdown(wait=False)

    async def _submit(self, chat: ChatRequest, put: _Put, request_id: str) -> Request:
        submitting = self._submitting.submit(self._pipeline.submit, chat, put, put, request_id)
        try:
            return await asyncio.wrap_future(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(_cancel)  # it may be too late to take the submission back
            raise


def _cancel(submitting: Future[Request]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()
