"""Answers the requests of both completion endpoints."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from nvlm_trt.api import ChatRequest, Delta, merge_answers
from nvlm_trt.errors import ServerError
from nvlm_trt.serving.gateway.answer_format import AnswerFormat, usage_json
from nvlm_trt.serving.gateway.events import StreamSettings, event_stream
from nvlm_trt.serving.gateway.gateway import Gateway
from nvlm_trt.serving.gateway.request_fields import SamplingFields, StreamOptions
from nvlm_trt.serving.gateway.source import ChatSource

_Result = TypeVar("_Result")


class ClientGoneError(Exception):
    """The client has closed its connection."""


@dataclass(frozen=True)
class Asked:
    """A request for answers, ready for the source."""

    chat: ChatRequest
    form: AnswerFormat
    stream: bool
    options: StreamOptions


def asked(fields: SamplingFields, chat: ChatRequest, form: AnswerFormat) -> Asked:
    return Asked(chat, form, bool(fields.stream), fields.stream_options or StreamOptions())


async def respond(gateway: Gateway, source: ChatSource, request: Request, question: Asked) -> Response:
    """Return the answers: one body, or a stream that begins with the first delta, so that an error before it has a
    status of its own. A client that leaves ends the request."""
    request_id, arrived = request.state.request_id, time.monotonic()
    deltas = _checked(gateway, source.stream(question.chat, request_id))
    try:
        if not question.stream:
            return await while_connected(request, _whole(deltas, question.form))
        prompt = None
        if question.options.continuous_usage_stats:
            prompt = await while_connected(request, source.count(question.chat, request_id))
        first = await while_connected(request, anext(deltas))
        gateway.metrics.first_event.observe(time.monotonic() - arrived)
    except BaseException:
        await deltas.aclose()
        raise
    settings = StreamSettings(bool(question.options.include_usage), prompt, gateway.options.send_seconds)
    return event_stream(_with_first(first, deltas), question.form, settings)


async def while_connected(request: Request, work: Awaitable[_Result]) -> _Result:
    """Await `work`, whose request has been read. Raises ClientGoneError, and cancels `work`, once the client leaves."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnection(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _checked(gateway: Gateway, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[Delta, None]:
    """Pass the deltas on. Raises ServerError for an answer that ends early: only a server that stops ends one."""
    ended = False
    try:
        async for delta in deltas:
            if delta.finish_reason == "cancelled":
                raise ServerError("the server ended an answer early")
            if delta.usage is not None:
                ended = True
                gateway.metrics.add_usage(delta.usage)
            yield delta
        if not ended:
            raise ServerError("the server ended an answer without its last delta")
    finally:
        if not ended:
            gateway.metrics.unanswered.inc()
        await deltas.aclose()


async def _with_first(first: Delta, rest: AsyncGenerator[Delta, None]) -> AsyncGenerator[Delta, None]:
    try:
        yield first
        async for delta in rest:
            yield delta
    finally:
        await rest.aclose()


async def _whole(deltas: AsyncGenerator[Delta, None], form: AnswerFormat) -> Response:
    collected = [delta async for delta in deltas]
    answers = merge_answers(collected)
    usage = collected[-1].usage
    assert usage is not None
    return JSONResponse({**form.whole(answers), "usage": usage_json(usage)})
