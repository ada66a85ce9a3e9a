"""Makes calls that are ended early without gRPC's cancel, where that is possible.

tritonserver 2.51 has a race that ends it once in some thousand cancelled streams (docs/reliability.md). So a request
carries a token. Whoever leaves early sends a second request on the same stream, which cancels the one of the token, and
reads on until the server has ended both. gRPC's cancel remains for a server that does not answer the second request,
for one of an earlier nvlm-trt, and for an interpreter that ends."""

from __future__ import annotations

import contextlib
import queue
import secrets
import sys
import threading
import time
from collections.abc import Generator
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from nvlm_trt.serving.chat_tensors import CANCEL_TOKEN
from nvlm_trt.serving.grpc_messages import cancelling_request, is_last, refuses_token, says_cancelled

ANSWER_SECONDS = 2  # for the server to say that it has cancelled a request
END_SECONDS = 5  # for it to end the cancelled requests of a client that closes
_INTERRUPTED_SECONDS = 0.5  # to wait for the end of a call that cannot be read

Responses = Generator[service_pb2.ModelStreamInferResponse, None, None]


class TokenRefusedError(Exception):
    """The server is of an earlier nvlm-trt, which knows no tokens."""


class AnswerCalls:
    """The calls of one client. Thread-safe."""

    def __init__(self, stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
        self._stub = stub
        self._with_tokens = True  # until the server refuses one
        self._ending: set[threading.Thread] = set()  # each ends one call

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
        """Wait until the cancelled requests have ended, for END_SECONDS at most."""
        deadline = time.monotonic() + END_SECONDS
        for thread in list(self._ending):
            thread.join(max(0, deadline - time.monotonic()))

    def _stream(self, call: _Call) -> Responses:
        try:
            yield from call
        finally:
            if not call.leave():
                self._end(call)

    def _end(self, call: _Call) -> None:
        """Read a call to its end on a thread of its own, and return as soon as the server has cancelled the request."""
        cancelled = threading.Event()

        def read() -> None:
            try:
                call.read_on(cancelled)
            finally:
                self._ending.discard(thread)

        thread = threading.Thread(target=read, name="nvlm-ending", daemon=True)
        self._ending.add(thread)
        thread.start()
        if not cancelled.wait(ANSWER_SECONDS):
            call.cancel()


class _Call:
    """A stream with one request, or with a second one that cancels the first. For one thread at a time."""

    def __init__(
        self,
        stub: service_pb2_grpc.GRPCInferenceServiceStub,
        request: service_pb2.ModelInferRequest,
        token: str | None = None,
    ) -> None:
        self._token = token
        # gRPC takes requests from it on a thread, until a None
        self._to_send: queue.SimpleQueue[service_pb2.ModelInferRequest | None] = queue.SimpleQueue()
        self._to_send.put(request)
        if token is None:
            self._to_send.put(None)
        self._answered = False  # the last response has come
        self._reading = False
        self._call: Any = stub.ModelStreamInfer(iter(self._to_send.get, None))

    def __iter__(self) -> _Call:
        return self

    def __next__(self) -> service_pb2.ModelStreamInferResponse:
        self._reading = True
        response = next(self._call)
        self._reading = False
        self._answered = is_last(response)
        if self._answered:
            self._to_send.put(None)
        if self._token and refuses_token(response):
            raise TokenRefusedError
        return response

    def leave(self) -> bool:
        """Cancel the request if it is not answered. Returns whether the call is over; else `read_on` has to follow."""
        if self._token and not self._answered:
            self._to_send.put(cancelling_request(self._token))
        self._to_send.put(None)
        if self._call.done():
            return True
        if self._token and self._reading:  # a signal has interrupted a read, which nobody can go on with
            ended = threading.Event()
            if self._call.add_callback(ended.set):
                ended.wait(_INTERRUPTED_SECONDS)
        elif self._token and not sys.is_finalizing():
            return False
        self._call.cancel()
        return True

    def read_on(self, cancelled: threading.Event) -> None:
        """Read to the end. Sets `cancelled` when the server says so, and at the end."""
        with contextlib.suppress(grpc.RpcError):
            for response in self._call:
                if says_cancelled(response):
                    cancelled.set()
        cancelled.set()

    def cancel(self) -> None:
        """Cancel the call as gRPC does."""
        self._call.cancel()
