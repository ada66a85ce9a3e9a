"""Streams answers as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from nvlm_trt.api import Delta, PromptCount
from nvlm_trt.serving.gateway.answer_format import AnswerFormat, Json, running_usage_json, scored_tokens, usage_json
from nvlm_trt.serving.gateway.errors import of_exception

_DONE = b"data: [DONE]\n\n"
_COMMENT_SECONDS = 15


@dataclass(frozen=True)
class StreamSettings:
    include_usage: bool
    prompt: PromptCount | None  # set: every chunk has the usage up to now
    send_seconds: float  # for a client to take an event


def event_stream(
    deltas: AsyncGenerator[Delta, None], form: AnswerFormat, settings: StreamSettings
) -> EventSourceResponse:
    """Return the response that streams `deltas`, the answers to one request.

    Sends a comment every 15 s, so that proxies keep the connection. Closes `deltas` when the client leaves, or takes no
    event for `send_seconds`."""
    return _EventResponse(
        deltas,
        _events(deltas, form, settings),
        ping=_COMMENT_SECONDS,
        ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
        send_timeout=settings.send_seconds,
        sep="\n",
    )


class _EventResponse(EventSourceResponse):
    """Closes the deltas in any case: the client may have left before the first event is taken from them."""

    def __init__(
        self, deltas: AsyncGenerator[Delta, None], events: AsyncGenerator[bytes, None], **settings: Any
    ) -> None:
        super().__init__(events, **settings)
        self._deltas = deltas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._deltas.aclose()


async def _events(
    deltas: AsyncGenerator[Delta, None], form: AnswerFormat, settings: StreamSettings
) -> AsyncGenerator[bytes, None]:
    begun: set[int] = set()
    tokens, usage = 0, None

    def event(chunk: Json) -> bytes:
        if settings.prompt is not None:
            chunk["usage"] = running_usage_json(settings.prompt, tokens)
        elif settings.include_usage:
            chunk["usage"] = None
        return _data(chunk)

    try:
        async for delta in deltas:
            tokens += len(delta.token_ids)
            if delta.index not in begun:
                begun.add(delta.index)
                if (opening := form.opening(delta.index)) is not None:
                    yield event(opening)
            if delta.text or scored_tokens(delta):
                yield event(form.chunk(delta))
            if delta.finish_reason:
                yield event(form.closing(delta))
            usage = delta.usage or usage
    except Exception as error:  # the status is sent already
        yield _data(of_exception(error).body())
        return
    if settings.include_usage and usage is not None:
        yield _data({**form.envelope([]), "usage": usage_json(usage)})
    yield _DONE


def _data(value: Json) -> bytes:
    # ASCII: some readers take U+2028 in a text for the end of a line
    return b"data: " + json.dumps(value, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"
