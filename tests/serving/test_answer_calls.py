"""Tests how calls are ended early, with a gRPC server of these tests: it does what a server of ours would not.

tests/integration/test_cancellation.py has the real server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from nvlm_trt.api import Delta
from nvlm_trt.errors import RequestError
from nvlm_trt.serving import answer_calls, async_answer_calls
from nvlm_trt.serving.chat_tensors import CANCEL, CANCEL_TOKEN, encode_delta
from nvlm_trt.serving.client import AsyncClient, Client

WAIT = 20.0
OLD = "invalid request: unknown request parameter 'cancel_token'; a request has the inputs prompt, messages"


@dataclass
class Stream:
    """What the server has seen of one stream."""

    tokens: list[str] = field(default_factory=list)  # of its first request, and of those that cancel
    half_closed: bool = False
    finished: bool = False  # by the server; else it was cancelled as gRPC does, or its client has vanished
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def cancelled(self) -> bool:
        assert self.ended.wait(WAIT)
        return not self.finished


class Server(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Streams tokens until it is told to cancel; then ends the stream as tritonserver does."""

    def __init__(self, tokens: int = 10**9, step: float = 0.01, answers: bool = True, **refusals: str) -> None:
        """A token takes `step` seconds; the one of number `tokens` is the last. `refusals` are the error messages to
        requests with a token and without. Unless `answers`, a request that cancels has no effect."""
        self.tokens, self.step, self.answers, self.refusals = tokens, step, answers, refusals
        self.streams: list[Stream] = []
        self.may_end = threading.Event()  # a stream that was cancelled
        self.may_end.set()

    def ModelStreamInfer(self, request_iterator: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        stream = Stream()
        context.add_callback(stream.ended.set)
        parameters = next(request_iterator).parameters
        if CANCEL_TOKEN in parameters:
            stream.tokens.append(parameters[CANCEL_TOKEN].string_param)
        self.streams.append(stream)
        told = threading.Event()

        def listen() -> None:
            with contextlib.suppress(Exception):  # the call was cancelled
                for later in request_iterator:
                    stream.tokens.append(later.parameters[CANCEL].string_param)
                    told.set()
                stream.half_closed = True

        listener = threading.Thread(target=listen)
        listener.start()
        refusal = self.refusals.get("with_token" if stream.tokens else "without_token")
        if refusal:
            yield service_pb2.ModelStreamInferResponse(error_message=refusal)
        else:
            yield from self._tokens(context, told)
        listener.join(WAIT)  # the stream ends once both sides have ended it
        stream.finished = context.is_active()

    def _tokens(self, context: grpc.ServicerContext, told: threading.Event) -> Iterator[Any]:
        for number in range(1, self.tokens + 1):
            if told.is_set() and self.answers:
                yield service_pb2.ModelStreamInferResponse()
                self.may_end.wait(WAIT)
                return
            last = number == self.tokens
            yield response_of(Delta("a", [1], finish_reason="length" if last else None), last)
            time.sleep(self.step)
            if not context.is_active():
                return


def response_of(delta: Delta, last: bool) -> service_pb2.ModelStreamInferResponse:
    message = service_pb2.ModelStreamInferResponse()
    message.infer_response.parameters["triton_final_response"].bool_param = last
    for name, array in encode_delta(delta).items():
        is_text = array.dtype == object
        message.infer_response.outputs.add(name=name, datatype="BYTES" if is_text else "INT32", shape=array.shape)
        raw = len(array[0]).to_bytes(4, "little") + array[0] if is_text else array.tobytes()
        message.infer_response.raw_output_contents.append(raw)
    return message


Serve = Callable[..., tuple[Server, str]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    with contextlib.ExitStack() as running:

        def start(**behaviour: Any) -> tuple[Server, str]:
            servicer, pool = Server(**behaviour), ThreadPoolExecutor(32)
            server = grpc.server(pool)
            service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
            port = server.add_insecure_port("127.0.0.1:0")
            server.start()
            running.callback(pool.shutdown)
            running.callback(lambda: server.stop(0).wait())
            return servicer, f"grpc://127.0.0.1:{port}"

        yield start


def leave(address: str, deltas: int, asynchronous: bool) -> None:
    """Reads some deltas of an answer, then closes it and the client."""

    async def leave_async() -> None:
        async with AsyncClient(address) as client:
            stream = client.stream("Hi")
            for _ in range(deltas):
                await anext(stream)
            await stream.aclose()

    if asynchronous:
        asyncio.run(leave_async())
        return
    with Client(address) as client:
        stream = client.stream("Hi")
        for _ in range(deltas):
            next(stream)
        stream.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_answer_that_is_closed_early_ends_without_grpcs_cancel(serve: Serve, asynchronous: bool) -> None:
    server, address = serve()
    for _ in range(3):
        leave(address, 2, asynchronous)
    for stream in server.streams:
        assert not stream.cancelled
        assert stream.half_closed
        token, cancelled = stream.tokens
        assert token == cancelled
    assert len({stream.tokens[0] for stream in server.streams}) == 3


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_answer_that_is_read_to_its_end_cancels_nothing(serve: Serve, asynchronous: bool) -> None:
    server, address = serve(tokens=3)
    leave(address, 3, asynchronous)  # the last delta alone ends it: nobody asks for a fourth
    (stream,) = server.streams
    assert (stream.cancelled, stream.half_closed, len(stream.tokens)) == (False, True, 1)


def test_a_stream_ends_with_its_answer_however_slowly_it_is_taken(serve: Serve) -> None:
    """A server that stops would wait for it, and break off what has not been taken."""
    server, address = serve(tokens=5)

    async def take_slowly() -> list[Delta]:
        async with AsyncClient(address) as client:
            stream = client.stream("Hi")
            first = await anext(stream)
            await asyncio.to_thread(server.streams[-1].ended.wait, WAIT)
            assert not server.streams[-1].cancelled
            return [first, *[delta async for delta in stream]]

    with Client(address) as client:
        stream = client.stream("Hi")
        first = next(stream)
        assert not server.streams[-1].cancelled  # it has ended
        taken = [first, *stream]
    assert len(taken) == len(asyncio.run(take_slowly())) == 5


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_server_that_does_not_answer_is_left_as_grpc_does(
    serve: Serve, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (answer_calls, async_answer_calls):
        monkeypatch.setattr(module, "ANSWER_SECONDS", 0.2)
    server, address = serve(answers=False)
    leave(address, 1, asynchronous)
    (stream,) = server.streams
    assert stream.cancelled


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_earlier_server_is_asked_again_without_a_token(serve: Serve, asynchronous: bool) -> None:
    server, address = serve(tokens=2, with_token=OLD)

    async def ask() -> list[str]:
        async with AsyncClient(address) as client:
            return [(await client.generate("Hi")).text for _ in range(2)]

    with Client(address) as client:
        texts = asyncio.run(ask()) if asynchronous else [client.generate("Hi").text for _ in range(2)]
    assert texts == ["aa", "aa"]
    assert [len(stream.tokens) for stream in server.streams] == [1, 0, 0]  # once in the life of a client
    server.tokens = 10**9
    leave(address, 1, asynchronous)
    assert server.streams[-1].cancelled


def test_closing_waits_for_the_word_of_the_server_and_not_for_the_end(serve: Serve) -> None:
    server, address = serve()
    server.may_end.clear()
    with Client(address) as client:
        stream = client.stream("Hi")
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert not server.streams[0].ended.is_set()
        server.may_end.set()
    assert not server.streams[0].cancelled


def test_no_thread_and_no_task_is_left(serve: Serve) -> None:
    _, address = serve()
    tasks: list[int] = []

    async def leave_many() -> None:
        async with AsyncClient(address) as client:
            streams = [client.stream(f"Hi {number}") for number in range(8)]
            for stream in streams:
                await anext(stream)
            await asyncio.gather(*[stream.aclose() for stream in streams])
        tasks.append(len(asyncio.all_tasks()))

    def leave_all() -> None:
        asyncio.run(leave_many())
        with Client(address) as client:
            streams = [client.stream(f"Hi {number}") for number in range(8)]
            for stream in streams:
                next(stream)
            for stream in streams:
                stream.close()  # type: ignore[attr-defined]

    leave_all()  # starts the threads of gRPC and of the server
    before = threading.active_count()
    for _ in range(3):
        leave_all()
    deadline = time.monotonic() + WAIT
    while threading.active_count() > before:
        assert time.monotonic() < deadline, [thread.name for thread in threading.enumerate()]
        time.sleep(0.01)
    assert tasks == [1] * 4


def test_a_cancelled_task_ends_its_request_without_grpcs_cancel(serve: Serve) -> None:
    server, address = serve()

    async def cancel() -> None:
        async with AsyncClient(address) as client:
            task = asyncio.ensure_future(client.generate("Hi"))
            while not server.streams:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancel())
    (stream,) = server.streams
    assert (stream.cancelled, stream.half_closed) == (False, True)


def test_a_task_cancelled_while_it_waits_for_an_answer_does_too(serve: Serve) -> None:
    server, address = serve(step=0.5)

    async def cancel() -> None:
        async with AsyncClient(address) as client:
            stream = client.stream("Hi")
            await anext(stream)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext(stream), 0.05)
            await stream.aclose()

    asyncio.run(cancel())
    (stream,) = server.streams
    assert (stream.cancelled, stream.half_closed) == (False, True)


def test_an_error_of_the_server_ends_its_stream(serve: Serve) -> None:
    server, address = serve(with_token="invalid request: the prompt is empty")
    with Client(address) as client, pytest.raises(RequestError, match="the prompt is empty"):
        client.generate("")
    (stream,) = server.streams
    assert (stream.cancelled, stream.half_closed, len(stream.tokens)) == (False, True, 1)


def test_an_interrupted_read_ends_its_request(serve: Serve) -> None:
    server, address = serve(step=0.3)
    script = (
        "import sys; from nvlm_trt.serving.client import Client\n"
        "with Client(sys.argv[1]) as client:\n"
        "    for delta in client.stream('Hi'):\n"
        "        print(delta.text, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, address], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as client:
        assert client.stdout is not None
        assert client.stdout.readline()
        os.kill(client.pid, signal.SIGINT)
        client.communicate(timeout=WAIT)
    (stream,) = server.streams
    assert (stream.cancelled, stream.half_closed, len(stream.tokens)) == (False, True, 2)


def test_a_script_that_ends_within_an_answer_ends(serve: Serve) -> None:
    _, address = serve()
    script = (
        "import sys; from nvlm_trt.serving.client import Client\n"
        "stream = Client(sys.argv[1]).stream('Hi')\n"
        "next(stream)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, address], capture_output=True, timeout=WAIT, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")
