"""Makes calls from asyncio that are ended early without gRPC's cancel; see answer_calls."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from tritonclient.grpc import service_pb2, service_pb2_grpc

from nvlm_trt.serving.answer_calls import ANSWER_SECONDS, END_SECONDS, Response, TokenRefusedError
from nvlm_trt.serving.chat_tensors import CANCEL_TOKEN
from nvlm_trt.serving.grpc_messages import cancelling_request, is_last, refuses_token, says_cancelled

AsyncResponses = AsyncGenerator[Response, None]


class AsyncAnswerCalls:
    """The calls of one client, in one event loop."""

    def __init__(self, stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
        self._stub = stub
        self._with_tokens = True  # until the server refuses one
        self._ending: set[asyncio.Task[None]] = set()  # each ends one call whose caller has left

    async def responses(self, request: service_pb2.ModelInferRequest) -> AsyncResponses:
        """Yield the responses to one request. Raises grpc.aio.AioRpcError.

        Closing the iterator, or cancelling its task, cancels the request and does not wait for its end."""
        if self._with_tokens:
            token = secrets.token_hex(16)
            request.parameters[CANCEL_TOKEN].string_param = token
            try:
                async with aclosing(self._stream(_Call(self._stub, request, token))) as responses:
                    async for response in responses:
                        yield response
                return
            except TokenRefusedError:
                self._with_tokens = False
                del request.parameters[CANCEL_TOKEN]
        async with aclosing(self._stream(_Call(self._stub, request))) as responses:
            async for response in responses:
                yield response

    async def finish(self) -> None:
        """Wait until the streams that nobody reads any more have ended, for END_SECONDS at most."""
        if self._ending:
            await asyncio.wait(self._ending, timeout=END_SECONDS)

    async def _stream(self, call: _Call) -> AsyncResponses:
        try:
            while (response := await call.received.get()) is not None:
                if isinstance(response, BaseException):
                    raise response
                if call.token and refuses_token(response):
                    raise TokenRefusedError
                yield response
        finally:
            ending = asyncio.ensure_future(call.leave())
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)


class _Call:
    """A stream with one request, or with a second one that cancels the first. A task reads ahead of the caller."""

    def __init__(
        self,
        stub: service_pb2_grpc.GRPCInferenceServiceStub,
        request: service_pb2.ModelInferRequest,
        token: str | None = None,
    ) -> None:
        self.token = token
        self.received: asyncio.Queue[Response | BaseException | None] = asyncio.Queue()  # None: the last was it
        self._to_send: asyncio.Queue[service_pb2.ModelInferRequest | None] = asyncio.Queue()  # None: nothing more
        self._to_send.put_nowait(request)
        if token is None:
            self._to_send.put_nowait(None)
        self._answered = False  # the last response has come
        self._cancelled = asyncio.Event()  # the server has said so, or the stream has ended
        self._call: Any = stub.ModelStreamInfer(_until_none(self._to_send))
        # the caller does not read, because gRPC cancels a call if the task that reads is cancelled
        self._reading = asyncio.ensure_future(self._read())

    async def leave(self) -> None:
        """Cancel the request, unless its last response has come, and wait for the end of the stream."""
        if self.token and not self._answered:
            self._to_send.put_nowait(cancelling_request(self.token))
            self._to_send.put_nowait(None)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._cancelled.wait(), ANSWER_SECONDS)
        if not self._answered and not self._cancelled.is_set():
            self._call.cancel()
        await asyncio.wait({self._reading})

    async def _read(self) -> None:
        try:
            async for response in self._call:
                self.received.put_nowait(response)
                if says_cancelled(response):
                    self._cancelled.set()
                elif is_last(response):
                    self._end()
        except BaseException as error:  # a CancelledError when the channel is closed; the caller would wait forever
            self.received.put_nowait(error)
        self._end()
        self._cancelled.set()

    def _end(self) -> None:
        """Tell the caller and the server that nothing more comes."""
        self._answered = True
        self.received.put_nowait(None)
        self._to_send.put_nowait(None)


async def _until_none(
    to_send: asyncio.Queue[service_pb2.ModelInferRequest | None],
) -> AsyncIterator[service_pb2.ModelInferRequest]:
    while (request := await to_send.get()) is not None:
        yield request
