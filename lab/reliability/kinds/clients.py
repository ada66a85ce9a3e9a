"""Brings clients that vanish, that read slowly, that cancel, and that talk nonsense."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import grpc
from tritonclient.grpc import service_pb2_grpc

from lab.code_state import ROOT
from lab.reliability.kind import Kind, kind
from lab.reliability.load import answer_tokens
from lab.reliability.place import Place, require_answers
from lab.reliability.promise import require, wait_until
from lab.reliability.served import Served
from lab.reliability.target import metric
from nvlm_trt.api import SamplingParams
from nvlm_trt.errors import QueueFullError
from nvlm_trt.serving.client import Client
from nvlm_trt.serving.grpc_messages import infer_request

KINDS: list[Kind] = []
_ENDLESS = {"max_tokens": 4000, "ignore_eos": True}
_CLIENT = """
import sys
from nvlm_trt.serving.client import Client
for delta in Client(sys.argv[1]).stream("Go on", sampling={"max_tokens": 4000, "ignore_eos": True}):
    print(delta.token_ids, flush=True)
"""
FREE = "their slots are free again, the server answers"


def require_idle(served: Served) -> None:
    """Waits until no request is open, then asks."""
    wait_until(lambda: metric(served.metrics_address, "nvlm_open_requests") == 0, "requests are still open", 60)
    require_answers(served)


def connect(served: Served, address: str) -> socket.socket:
    parts = urllib.parse.urlsplit(address)
    return socket.create_connection((parts.hostname or "", parts.port or 0), timeout=30)


def post(sampling: Mapping[str, object], length: int | None = None) -> bytes:
    """Writes a request over HTTP. `length` replaces the true length of its body."""
    body = json.dumps({"prompt": "Go on", "sampling_parameters": json.dumps(sampling)}).encode()
    head = f"POST /v2/models/nvlm/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {length or len(body)}\r\n\r\n"
    return head.encode() + body


@kind(KINDS, "8 clients killed mid-stream", FREE)
def _vanish(place: Place) -> None:
    served = place.serve()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _CLIENT, served.address]
    clients = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(8)]
    try:
        for client in clients:
            assert client.stdout is not None
            require(bool(client.stdout.readline()), "a client received no token")
    finally:
        for client in clients:
            client.kill()
            client.communicate()
    require_idle(served)


@kind(KINDS, "8 clients of HTTP reset their connections mid-stream", FREE)
def _reset(place: Place) -> None:
    served = place.serve()
    for _ in range(8):
        with connect(served, served.http_address) as client:
            client.sendall(post(_ENDLESS))
            client.recv(100)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close sends a reset
    require_idle(served)


@kind(KINDS, "clients that never read", "others are answered; SIGTERM ends serve with status 0")
def _slow(place: Place) -> None:
    served = place.serve()
    with contextlib.ExitStack() as opened:
        for _ in range(3):
            client = opened.enter_context(connect(served, served.http_address))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.sendall(post({**_ENDLESS, "logprobs": 20}))
        # not a Client, which reads ahead
        channel = opened.enter_context(grpc.insecure_channel(served.address.removeprefix("grpc://")))
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        asked = infer_request("Go on", sampling={**_ENDLESS, "logprobs": 20})
        streams = [stub.ModelStreamInfer(iter([asked])) for _ in range(3)]
        for stream in streams:
            next(stream)
        for _ in range(5):
            require_answers(served, "beside clients that never read")
        status = served.stop()
    require(status == 0, f"serve ended with status {status}")


@kind(KINDS, "300 requests cancelled at once", "none is left open, the server answers as before")
def _storm(place: Place) -> None:
    served = place.serve()
    before = answer_tokens(served.address)

    def ask_and_leave(number: int) -> None:
        with Client(served.address) as client:
            stream = client.stream(f"Go on {number}", sampling=_ENDLESS)
            if number % 3:
                with contextlib.suppress(QueueFullError):
                    next(stream)
            stream.close()  # type: ignore[attr-defined]

    with ThreadPoolExecutor(32) as threads:
        list(threads.map(ask_and_leave, range(300)))
    require_idle(served)
    require(answer_tokens(served.address) == before, "another answer than before")


@kind(KINDS, "120 requests at once", "each finishes, or is told that the queue is full")
def _overload(place: Place) -> None:
    served = place.serve()

    def ask(number: int) -> str:
        try:
            with Client(served.address) as client:
                answer = client.generate(f"Tell me {number}", sampling=SamplingParams(max_tokens=20, ignore_eos=True))
                return answer.finish_reason or "no reason"
        except QueueFullError:
            return "queue full"

    with ThreadPoolExecutor(120) as threads:
        ends = list(threads.map(ask, range(120)))
    require(set(ends) <= {"length", "queue full"}, f"requests ended with {set(ends)}")
    require_idle(served)


@kind(KINDS, "requests cut in the middle", "the server answers others, and afterwards")
def _cut(place: Place) -> None:
    served = place.serve()
    with contextlib.ExitStack() as opened:
        for address in (served.http_address, served.address, served.metrics_address):
            for piece in (
                b"",
                b"POST /v2/models/nvlm/gen",
                post({}, length=10_000),
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            ):
                client = opened.enter_context(connect(served, address))
                client.sendall(piece)
        require_answers(served, "beside requests that were cut")
    require_idle(served)


@kind(KINDS, "200 connections without a request", "the server answers others, and afterwards")
def _idle(place: Place) -> None:
    served = place.serve()
    with contextlib.ExitStack() as opened:
        for address in (served.http_address, served.address):
            for _ in range(100):
                opened.enter_context(connect(served, address))
        require_answers(served, "beside idle connections")
        time.sleep(1)
    require_idle(served)


@kind(KINDS, "random bytes to every port", "the server answers afterwards")
def _nonsense(place: Place) -> None:
    served = place.serve()
    for address in (served.http_address, served.address, served.metrics_address):
        for size in (1, 100, 100_000):
            with contextlib.suppress(OSError), connect(served, address) as client:
                client.sendall(os.urandom(size))
                client.settimeout(2)
                client.recv(100)
    require_idle(served)
