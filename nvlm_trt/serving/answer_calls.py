"""Makes calls that are ended early without gRPC's cancel, where that is possible.

tritonserver 2.51 has a race that ends it once in some thousand cancelled streams (docs/reliability.md). So a request
carries a token. Whoever leaves early sends a second request on the same stream, which cancels the one of the token, and
the stream is read until the server has ended both. gRPC's cancel remains for a server that does not answer the second
request, and for one of an earlier nvlm-trt. A process that ends within an answer drops its connection."""

from __future__ import annotations

import queue
import secrets
import sys
import threading
import time
import weakref
from collections.abc import Generator
from typing import TypeAlias

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from nvlm_trt.serving.chat_tensors import CANCEL_TOKEN
from nvlm_trt.serving.grpc_messages import cancelling_request, is_last, refuses_token, says_cancelled

ANSWER_SECONDS = 2  # for the server to say that it has cancelled a request
END_SECONDS = 5  # for it to end the streams of a client that closes

Response: TypeAlias = service_pb2.ModelStreamInferResponse
Responses = Generator[Response, None, None]


class TokenRefusedError(Exception):
    """The server is of an earlier nvlm-trt, which knows no tokens."""


class AnswerCalls:
    """The calls of one client. Thread-safe."""

    def __init__(self, stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
        self._stub = stub
        self._with_tokens = True  # until the server refuses one
        self._calls: weakref.WeakSet[_Call] = weakref.WeakSet()

    def responses(self, request: service_pb2.ModelInferRequest) -> Responses:
        """Yield the responses to one request. Raises grpc.RpcError.

        Closing the iterator cancels the request: it returns when the server has said so, after ANSWER_SECONDS at most.
        """
        if self._with_tokens:
            token = secrets.token_hex(16)
            request.parameters[CANCEL_TOKEN].string_param = token
            try:
                yield from self._stream(_Call(self._stub, request, token))
                return
            except TokenRefusedError:
                self._with_tokens = False
                del request.parameters[CANCEL_TOKEN]
        yield from self._stream(_Call(self._stub, request))

    def finish(self) -> None:
        """Wait until the streams that nobody reads any more have ended, for END_SECONDS at most."""
        deadline = time.monotonic() + END_SECONDS
        for call in list(self._calls):
            if call.left:
                call.join(max(0, deadline - time.monotonic()))

    def _stream(self, call: _Call) -> Responses:
        self._calls.add(call)
        try:
            call.start()
            yield from call.responses()
        finally:
            call.leave()


class _Call(threading.Thread):
    """A stream with one request, or with a second one that cancels the first.

    The thread reads ahead of the caller. So a stream ends, and with it what the server keeps of it, when its answer
    does, however slowly the caller takes the responses; and the stream of a caller that has left is read on."""

    def __init__(
        self,
        stub: service_pb2_grpc.GRPCInferenceServiceStub,
        request: service_pb2.ModelInferRequest,
        token: str | None = None,
    ) -> None:
        super().__init__(name="nvlm-call", daemon=True)
        self.left = False  # the caller takes no more responses
        self._token = token
        self._received: queue.SimpleQueue[Response | Exception | None] = queue.SimpleQueue()  # None: the last was it
        # gRPC takes requests from it on a thread of its own, until a None
        self._to_send: queue.SimpleQueue[service_pb2.ModelInferRequest | None] = queue.SimpleQueue()
        self._to_send.put(request)
        if token is None:
            self._to_send.put(None)
        self._answered = False  # the last response has come
        self._cancelled = threading.Event()  # the server has said so, or the stream has ended
        self._call: grpc.Call = stub.ModelStreamInfer(iter(self._to_send.get, None))

    def run(self) -> None:
        try:
            for response in self._call:
                self._received.put(response)
                if says_cancelled(response):
                    self._cancelled.set()
                elif is_last(response):
                    self._end()
        except Exception as error:  # else the caller would wait forever
            self._received.put(error)
        self._end()
        self._cancelled.set()

    def responses(self) -> Responses:
        while (response := self._received.get()) is not None:
            if isinstance(response, Exception):
                raise response
            if self._token and refuses_token(response):
                raise TokenRefusedError
            yield response

    def leave(self) -> None:
        """Cancel the request, unless its last response has come."""
        self.left = True
        # a thread that the end of the interpreter has stopped may hold a lock of the call for ever
        if self._answered or sys.is_finalizing():
            return
        is_cancelled = False
        try:
            if self._token:
                self._to_send.put(cancelling_request(self._token))
                self._to_send.put(None)
                is_cancelled = self._cancelled.wait(ANSWER_SECONDS)
        finally:
            if not is_cancelled:
                self._call.cancel()

    def _end(self) -> None:
        """Tell the caller and the server that nothing more comes."""
        self._answered = True
        self._received.put(None)
        self._to_send.put(None)
