"""Streams: a client that leaves frees its slot, one that does not read holds up nobody, a stop finishes answers."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gateway_calls import CHAT, COUNT, ENDLESS, image_part, png, request_head, wait_until
from live_gateway import LiveGateway, open_gateway

from nvlm_trt.errors import EngineError
from nvlm_trt.runtime.request import Request
from nvlm_trt.serving.gateway import events
from nvlm_trt.serving.gateway.gateway import GatewayOptions


def read_until(connection: socket.socket, wanted: bytes) -> bytes:
    seen = b""
    while wanted not in seen:
        piece = connection.recv(1 << 12)
        assert piece, seen
        seen += piece
    return seen


def tokens_generated(live: LiveGateway) -> int:
    return live.pipeline.metrics().generator.tokens_generated


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_frees_its_slot(live: LiveGateway, stream: bool) -> None:
    with live.begin(live.body(**ENDLESS, stream=stream)) as connection:
        if stream:
            read_until(connection, b'"content":"')
        wait_until(lambda: live.active == 1, "the request has a slot")
    live.wait_until_idle()
    assert live.pipeline.metrics().generator.requests_finished["cancelled"] >= 1
    assert tokens_generated(live) < 3000


def test_the_slot_is_free_within_a_step(live: LiveGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the tokens that are generated after the gateway has cancelled the request: at most the one that is being
    computed."""
    at_cancellation: list[int] = []
    cancel = Request.cancel

    def noting(request: Request) -> None:
        at_cancellation.append(tokens_generated(live))
        cancel(request)

    monkeypatch.setattr(Request, "cancel", noting)
    with live.begin(live.body(**ENDLESS, stream=True)) as connection:
        read_until(connection, b'"content":"')
    wait_until(lambda: bool(at_cancellation), "the request is cancelled")
    live.wait_until_idle()
    assert tokens_generated(live) - at_cancellation[0] <= 1


def test_a_client_that_leaves_the_queue(live: LiveGateway) -> None:
    """Also before the first delta, when no header has been sent."""
    with contextlib.ExitStack() as endless:
        for number in range(1, 9):
            endless.enter_context(live.begin(live.body(**ENDLESS, stream=True)))
            wait_until(lambda number=number: live.active == number, "all slots are taken")
        with live.begin(live.body(stream=True)):
            wait_until(lambda: live.queued == 1, "one request waits")
        wait_until(lambda: live.queued == 0, "the request that waited is gone")
        assert live.active == 8
    live.wait_until_idle()


def test_a_client_that_leaves_while_its_image_is_decoded(live: LiveGateway) -> None:
    big = png(1, 2000, 2000)
    for path in (CHAT, COUNT):
        with live.begin(live.body([image_part(big)]), path):
            pass
    live.wait_until_idle()
    assert live.chat([image_part(png(1))]).status == 200


def test_a_reset_connection(live: LiveGateway) -> None:
    connection = live.begin(live.body(**ENDLESS, stream=True))
    read_until(connection, b'"content":"')
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    live.wait_until_idle()


def test_a_client_that_stops_reading(engine: Callable[[str], Path]) -> None:
    """Its connection ends after a while, and its slot is free; others are answered meanwhile."""
    with open_gateway(engine("nvlm-h-tiny"), GatewayOptions(send_seconds=0.5)) as live:
        body = live.body(**ENDLESS, stream=True, logprobs=True, top_logprobs=20)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", live.port))
            data = json.dumps(body).encode()
            connection.sendall(request_head(CHAT, len(data)) + data)
            wait_until(lambda: live.active == 1, "the request has a slot")
            assert live.chat("Hi", max_tokens=2).status == 200
            wait_until(lambda: live.active == 0, "the slot is free")
            assert live.pipeline.metrics().generator.requests_finished.get("cancelled", 0) == 1
        assert live.call("GET", "/health/ready").status == 200


def test_a_comment_keeps_a_silent_stream_open(live: LiveGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    assert events._COMMENT_SECONDS == 15
    monkeypatch.setattr(events, "_COMMENT_SECONDS", 0.05)
    with live.begin(live.body(**ENDLESS, stream=True)) as connection:
        assert read_until(connection, b": keep-alive\n\n").startswith(b"HTTP/1.1 200")
    live.wait_until_idle()


def test_a_wrong_request_keeps_its_status(live: LiveGateway) -> None:
    """The image is decoded after the request was accepted; the headers wait for it."""
    reply = live.chat([image_part(png(1)[:200])], stream=True)
    assert (reply.status, reply.error["code"]) == (400, "invalid_image")


def test_an_engine_that_fails_in_a_stream(engine: Callable[[str], Path]) -> None:
    """The status is sent; the error is the stream's last event, and tells nothing of the inside."""
    with open_gateway(engine("nvlm-h-tiny"), GatewayOptions()) as live:
        with live.begin(live.body(**ENDLESS, stream=True)) as connection:
            read_until(connection, b'"content":"')

            def fail() -> None:
                raise EngineError("cannot read /secret/path")

            live.pipeline._generator._steps.step = fail  # type: ignore[attr-defined]
            rest = read_until(connection, b"\r\n0\r\n\r\n").decode()
        last = [line for line in rest.splitlines() if line.startswith("data: ")][-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["code"], error["type"]) == ("internal_error", "server_error")
        assert "secret" not in rest
        assert "[DONE]" not in rest
        assert live.call("GET", "/health/ready").status == 503
        assert live.chat().status == 500


def test_a_stop_finishes_the_open_answers(engine: Callable[[str], Path]) -> None:
    """While it drains, the gateway is alive and not ready, and refuses what is new."""
    with open_gateway(engine("nvlm-h-tiny"), GatewayOptions()) as live:
        body = live.body(max_tokens=400, ignore_eos=True, stream=True)
        with live.begin(body) as connection:
            seen = read_until(connection, b'"content":"')
            stopping = threading.Thread(target=live.server.stop)
            live.server.drain()
            assert live.call("GET", "/health").status == 200
            ready = live.call("GET", "/health/ready")
            assert (ready.status, ready.json) == (503, {"status": "draining"})
            assert live.chat().error["code"] == "service_unavailable"
            stopping.start()
            seen += read_until(connection, b"[DONE]")
            stopping.join()
        assert b'"finish_reason":"length"' in seen
        with pytest.raises(OSError):
            live.call("GET", "/health")


def test_a_stop_in_a_hurry(engine: Callable[[str], Path]) -> None:
    with open_gateway(engine("nvlm-h-tiny"), GatewayOptions()) as live:
        with live.begin(live.body(**ENDLESS, stream=True)) as connection:
            read_until(connection, b'"content":"')
            hurry = threading.Event()
            hurry.set()
            live.server.stop(hurry)
        live.wait_until_idle()


def test_a_slow_reader_gets_everything(live: LiveGateway) -> None:
    body: dict[str, Any] = live.body(max_tokens=300, ignore_eos=True, logprobs=True, top_logprobs=20)
    seen = 0
    with live.begin({**body, "stream": True}) as connection:
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            piece = connection.recv(997)
            assert piece
            data += piece
            seen += 1
    assert data.count(b'"finish_reason":"length"') == 1
    assert data.count(b'"top_logprobs"') == 300
    assert seen > 100


def test_nothing_is_logged_of_clients_that_leave(live: LiveGateway, caplog: pytest.LogCaptureFixture) -> None:
    with live.begin(live.body([image_part(png(2, 2000, 2000))]), COUNT):
        pass
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        connection.sendall(request_head(CHAT, 100) + b"{")
    with live.begin(live.body(**ENDLESS)):
        wait_until(lambda: live.active == 1, "the request has a slot")
    live.wait_until_idle()
    assert live.chat().status == 200
    assert [record.getMessage() for record in caplog.records if record.levelname != "INFO"] == []
