"""Makes calls from asyncio that are ended early without gRPC's cancel; see answer_calls."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from nvlm_trt.serving.answer_calls import ANSWER_SECONDS, END_SECONDS, TokenRefusedError
from nvlm_trt.serving.chat_tensors import CANCEL_TOKEN
from nvlm_trt.serving.grpc_messages import cancelling_request, is_last, refuses_token, says_cancelled

Responses = AsyncGenerator[service_pb2.ModelStreamInferResponse, None]


class AsyncAnswerCalls:
    """The calls of one client, in one event loop."""

    def __init__(self, stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
        self._stub = stub
        self._with_tokens = True  # until the server refuses one
        self._ending: set[asyncio.Task[None]] = set()  # each ends one call

    async def responses(self, request: service_pb2.ModelInferRequest) -> Responses:
        """Yield the responses to one request. Raises grpc.aio.AioRpcError.

        Closing the iterator, or cancelling its task, cancels the request and does not wait for its end."""
        if self._with_tokens:
            token = secrets.token_hex(16)
            request.parameters[CANCEL_TOKEN].string_param = token
            try:
                async with aclosing(self._stream(request, token)) as responses:
                    async for response in responses:
                        yield response
                return
            except TokenRefusedError:
                self._with_tokens = False
                del request.parameters[CANCEL_TOKEN]
        async with aclosing(self._stream(request)) as responses:
            async for response in responses:
                yield response

    async def finish(self) -> None:
        """Wait until the cancelled requests have ended, for END_SECONDS at most."""
        if self._ending:
            await asyncio.wait(self._ending, timeout=END_SECONDS)

    async def _stream(self, request: service_pb2.ModelInferRequest, token: str | None = None) -> Responses:
        to_send: asyncio.Queue[service_pb2.ModelInferRequest | None] = asyncio.Queue()  # None: nothing more
        to_send.put_nowait(request)
        if token is None:
            to_send.put_nowait(None)
        call: Any = self._stub.ModelStreamInfer(_until_none(to_send))
        answered = False
        try:
            while True:
                # shielded, because gRPC cancels a call whose reader is cancelled
                reading = asyncio.ensure_future(call.read())
                response = await asyncio.shield(reading)
                if response is grpc.aio.EOF:
                    return
                if is_last(response):
                    answered = True
                    to_send.put_nowait(None)
                if token and refuses_token(response):
                    raise TokenRefusedError
                yield response
        finally:
            if token and not answered:
                to_send.put_nowait(cancelling_request(token))
            to_send.put_nowait(None)
            if not call.done():
                ending = asyncio.ensure_future(_end(call, reading, ANSWER_SECONDS if token else 0))
                self._ending.add(ending)
                ending.add_done_callback(self._ending.discard)


async def _until_none(
    to_send: asyncio.Queue[service_pb2.ModelInferRequest | None],
) -> AsyncIterator[service_pb2.ModelInferRequest]:
    while (request := await to_send.get()) is not None:
        yield request


async def _end(call: Any, reading: asyncio.Future[Any], seconds: float) -> None:
    """Read a call to its end, beginning with the outstanding read. Cancel it as gRPC does, unless the server says
    within `seconds` that it has cancelled the request."""
    cancelled = asyncio.Event()
    read = asyncio.ensure_future(_read_on(call, reading, cancelled))
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(cancelled.wait(), seconds)
    if not cancelled.is_set():
        call.cancel()
    await asyncio.wait({read})


async def _read_on(call: Any, reading: asyncio.Future[Any], cancelled: asyncio.Event) -> None:
    try:
        with contextlib.suppress(grpc.RpcError):
            response = await reading
            while response is not grpc.aio.EOF:
                if says_cancelled(response):
                    cancelled.set()
                response = await call.read()
    finally:
        cancelled.set()
