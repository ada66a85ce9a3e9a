"""Forty wrong requests and more: each gets its status and its code, no answer is a 500, and the gateway lives on."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import struct
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from gateway_calls import CHAT, COUNT, ENDLESS, data_uri, image_part, png, text_part, wait_until
from live_gateway import MAX_QUEUE, LiveGateway, open_gateway

from nvlm_trt.image.image_limits import ImageLimits
from nvlm_trt.serving.gateway.gateway import GatewayOptions
from nvlm_trt.serving.gateway.server import GatewayServer

IMAGE = png()
ENCODED = base64.b64encode(IMAGE).decode()


def url(text: str) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": text}}]


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header states a size, without as many pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + IMAGE[33:]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


# what is wrong: the content of the user's message -> code, and a word of the message
CONTENTS: dict[str, tuple[Any, str, str]] = {
    "a data: URI without data": (url("data:"), "invalid_image", "data:image/TYPE;base64"),
    "a data: URI without base64": (url(f"data:image/png,{ENCODED}"), "invalid_image", "data:image/TYPE;base64"),
    "a data: URI of a text": (url("data:text/plain;base64,aGk="), "invalid_image", "data:image/TYPE;base64"),
    "base64 with a wrong character": (
        url(f"data:image/png;base64,{ENCODED[:40]}*{ENCODED[41:]}"),
        "invalid_image",
        "base64",
    ),
    "base64 with a character beyond ASCII": (
        url(f"data:image/png;base64,{ENCODED[:-8]}äöüß"),
        "invalid_image",
        "base64",
    ),
    "base64 with a line break": (
        url(f"data:image/png;base64,{ENCODED[:40]}\n{ENCODED[40:]}"),
        "invalid_image",
        "base64",
    ),
    "base64 without its padding": (
        url(f"data:image/png;base64,{base64.b64encode(IMAGE + b'1').decode().rstrip('=')}"),
        "invalid_image",
        "base64",
    ),
    "base64 alone": (url(ENCODED), "invalid_image", "not data:image"),
    "no image in the data: URI": (url("data:image/png;base64,"), "invalid_image", "0 bytes"),
    "a text as an image": (url(data_uri(b"this is no image")), "invalid_image", "image"),
    "a truncated image": (url(data_uri(IMAGE[: len(IMAGE) // 2])), "invalid_image", "truncated or corrupt"),
    "an image over 64 megapixels": (url(data_uri(png_header(9000, 9000))), "invalid_image", "9000 x 9000"),
    "the second image is broken": ([image_part(IMAGE), *url("data:x")], "invalid_image", "image 2"),
    "17 images": ([image_part(IMAGE)] * 17, "too_many_images", "17 images"),
    "more image tokens than the engine holds": (
        [image_part(png(i, 300, 200)) for i in range(12)],
        "context_length_exceeded",
        "cross-attended",
    ),
    "a prompt over the context": ("word " * 2000, "context_length_exceeded", "4096"),
    "a prompt of millions of characters": ("w" * 5_000_000, "context_length_exceeded", "characters"),
    "an http URL": (url("http://example.com/a.png"), "invalid_image", "not read"),
    "an https URL of this machine": (url("https://127.0.0.1/a.png"), "invalid_image", "not read"),
    "a file: URL": (url("file:///etc/passwd"), "invalid_image", "not data:"),
    "a path": (url("/etc/passwd"), "invalid_image", "not data:"),
    "an URL that is none": (url("http://[::1"), "invalid_image", "not data:"),
    "a part of an unknown type": ([{"type": "input_audio", "input_audio": {}}], "invalid_value", "input_audio"),
    "a part without a type": ([{"text": "Hi"}], "invalid_value", "messages[0].content[0]"),
    "a text part without text": ([{"type": "text"}], "missing_parameter", "messages[0].content[0].text"),
    "a part with an unknown key": (
        [{**text_part("Hi"), "size": 3}],
        "unknown_parameter",
        "messages[0].content[0].size",
    ),
    "an unknown detail": (
        [image_part(IMAGE, detail="sharp")],
        "invalid_value",
        "messages[0].content[0].image_url.detail",
    ),
    "content of a number": (7, "invalid_value", "messages[0].content"),
    "content of null": (None, "invalid_value", "messages[0].content"),
    "an empty content": ("", "invalid_request", "empty"),
    "no parts": ([], "invalid_request", "empty"),
    "blank content": (" \n", "invalid_request", "empty"),
    "half a surrogate pair": ("a\ud800b", "invalid_request", "surrogate"),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("path", [CHAT, COUNT], ids=["chat", "count"])
def test_bad_content(live: LiveGateway, name: str, path: str) -> None:
    content, code, word = CONTENTS[name]
    assert_refused(live, path, live.body(content), 400, code, word)


CONVERSATIONS: dict[str, tuple[Any, str, str]] = {
    "no messages": ([], "invalid_value", "messages"),
    "messages of null": (None, "invalid_value", "messages"),
    "the assistant is last": ([user("Hi"), {"role": "assistant", "content": "Ho"}], "invalid_request", "last"),
    "a system message in the middle": (
        [user("Hi"), {"role": "system", "content": "x"}, user("Hi")],
        "invalid_request",
        "system",
    ),
    "a system message alone": ([{"role": "system", "content": "x"}], "invalid_request", "last"),
    "an unknown role": ([{"role": "robot", "content": "x"}], "invalid_value", "robot"),
    "a tool's answer": ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "invalid_value", "tool"),
    "no role": ([{"content": "x"}], "invalid_value", "messages[0]"),
    "no content": ([{"role": "user"}], "missing_parameter", "messages[0].content"),
    "an image of the assistant": (
        [user("Hi"), {"role": "assistant", "content": [image_part(IMAGE)]}, user("Hi")],
        "invalid_value",
        "messages[1].content[0]",
    ),
    "a tool call": (
        [user("Hi"), {"role": "assistant", "content": "", "tool_calls": [{}]}, user("Hi")],
        "invalid_value",
        "messages[1].tool_calls",
    ),
    "a message with an unknown key": ([{**user("Hi"), "mood": 1}], "unknown_parameter", "messages[0].mood"),
    "a message of text": (["Hi"], "invalid_value", "messages[0]"),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_bad_conversations(live: LiveGateway, name: str) -> None:
    messages, code, word = CONVERSATIONS[name]
    assert_refused(live, CHAT, {"model": live.model, "messages": messages}, 400, code, word)


# what is wrong -> fields, code; the message names the first of the fields
FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "n = 0": ({"n": 0}, "invalid_value"),
    "n over the slots": ({"n": 9}, "invalid_value"),
    "n = true": ({"n": True}, "invalid_value"),
    "max_tokens = 0": ({"max_tokens": 0}, "invalid_value"),
    "max_completion_tokens beside max_tokens, of -1": ({"max_completion_tokens": -1, "max_tokens": 8}, "invalid_value"),
    "a number as text": ({"temperature": "0.7"}, "invalid_value"),
    "a temperature below 0": ({"temperature": -1}, "invalid_value"),
    "top_p = 0": ({"top_p": 0}, "invalid_value"),
    "seventeen stop strings": ({"stop": ["x"] * 17}, "invalid_value"),
    "an empty stop string": ({"stop": [""]}, "invalid_value"),
    "stop of numbers": ({"stop": [7]}, "invalid_value"),
    "top_logprobs = 21": ({"top_logprobs": 21, "logprobs": True}, "invalid_value"),
    "top_logprobs without logprobs": ({"top_logprobs": 2}, "invalid_value"),
    "logit_bias of an id beyond the vocabulary": ({"logit_bias": {"999999": 1}}, "invalid_value"),
    "logit_bias of a word": ({"logit_bias": {"word": 1}}, "invalid_value"),
    "logit_bias of 101": ({"logit_bias": {"5": 101}}, "invalid_value"),
    "logit_bias of too many ids": ({"logit_bias": {str(i): 1 for i in range(1025)}}, "invalid_value"),
    "presence_penalty = 3": ({"presence_penalty": 3}, "invalid_value"),
    "min_tokens over max_tokens": ({"min_tokens": 50, "max_tokens": 8}, "invalid_value"),
    "a priority of 32 bits": ({"priority": 1 << 31}, "invalid_value"),
    "a priority that is no integer": ({"priority": "high"}, "invalid_value"),
    "a seed of 65 bits": ({"seed": 1 << 64}, "invalid_value"),
    "max_tiles over the engine's": ({"max_tiles": 7}, "invalid_value"),
    "an unknown key": ({"temprature": 0.7}, "unknown_parameter"),
    "stream_options with an unknown key": ({"stream_options": {"usage": True}}, "unknown_parameter"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "unsupported_parameter"),
    "tool_choice": ({"tool_choice": "required"}, "unsupported_parameter"),
    "functions": ({"functions": [{"name": "f"}]}, "unsupported_parameter"),
    "audio": ({"audio": {"voice": "alloy", "format": "wav"}}, "unsupported_parameter"),
    "audio in modalities": ({"modalities": ["text", "audio"]}, "unsupported_parameter"),
    "reasoning_effort": ({"reasoning_effort": "low"}, "unsupported_parameter"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_bad_fields(live: LiveGateway, name: str) -> None:
    fields, code = FIELDS[name]
    error = assert_refused(live, CHAT, live.body(**fields), 400, code, next(iter(fields)))
    assert error["param"].startswith(next(iter(fields)))


BODIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "invalid_json"),
    "no JSON": (b"{", "invalid_json"),
    "a list": (b"[]", "invalid_json"),
    "no UTF-8": (b'{"model": "\xff"}', "invalid_json"),
    "NaN": (b'{"model": "m", "messages": [], "temperature": NaN}', "invalid_json"),
    "infinity": (b'{"model": "m", "messages": [], "temperature": 1e999}', "invalid_json"),
    "an integer of 5000 digits": (b'{"seed":' + b"9" * 5000 + b"}", "invalid_json"),
    "brackets without end": (b"[" * 200_000, "invalid_json"),
    "a hundred thousand keys": (json.dumps({f"k{i}": 1 for i in range(100_000)}).encode(), "invalid_json"),
    "a million messages": (b'{"model": "m", "messages": [' + b"1," * 1_000_000 + b"1]}", "invalid_value"),
    "no model": (b'{"messages": []}', "missing_parameter"),
}


@pytest.mark.parametrize("name", BODIES)
def test_bad_bodies(live: LiveGateway, name: str) -> None:
    body, code = BODIES[name]
    assert live.post(CHAT, body).error["code"] == code
    assert_alive(live)


def test_an_unknown_model(live: LiveGateway) -> None:
    error = assert_refused(live, CHAT, {**live.body(), "model": "gpt-9"}, 404, "model_not_found", "gpt-9")
    assert error["param"] == "model"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_that_does_not_call_itself_json(live: LiveGateway, kind: str) -> None:
    reply = live.post(CHAT, live.body(), content_type=kind)
    assert (reply.status, reply.error["code"]) == (415, "unsupported_media_type")


ROUTES: dict[str, tuple[str, str, int]] = {
    "an unknown path": ("GET", "/v1/nothing", 404),
    "GET of an endpoint": ("GET", CHAT, 405),
    "POST of the models": ("POST", "/v1/models", 405),
    "a path with dots": ("GET", "/v1/../../etc/passwd", 404),
    "FastAPI's pages": ("GET", "/docs", 404),
}


@pytest.mark.parametrize("name", ROUTES)
def test_bad_routes(live: LiveGateway, name: str) -> None:
    method, path, status = ROUTES[name]
    reply = live.call(method, path)
    assert reply.status == status
    assert reply.error["type"] == "invalid_request_error"


# --- bodies of the wrong size ----------------------------------------------------------------------------------------


def raw(live: LiveGateway, head: str, chunks: Callable[[socket.socket], None] | None = None) -> bytes:
    """Send a request by hand; return the first bytes of the answer."""
    with socket.create_connection(("127.0.0.1", live.port), timeout=30) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode())
        if chunks is not None:
            with contextlib.suppress(ConnectionError):  # the gateway may close before all is sent
                chunks(connection)
        answer = b""
        while not answer.endswith(b"}") and (piece := connection.recv(1 << 16)):
            answer += piece
        return answer


def test_a_body_of_100_mb_by_its_length(live: LiveGateway) -> None:
    """It is refused before it is sent."""
    answer = raw(live, f"POST {CHAT} HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: 100000000\n\n")
    assert answer.startswith(b"HTTP/1.1 413")
    assert b'"code":"request_too_large"' in answer
    assert_alive(live)


def test_a_body_of_100_mb_in_chunks(live: LiveGateway) -> None:
    def send(connection: socket.socket) -> None:
        piece = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
        for _ in range(100):
            connection.sendall(piece)

    answer = raw(
        live, f"POST {CHAT} HTTP/1.1\nHost: x\nContent-Type: application/json\nTransfer-Encoding: chunked\n\n", send
    )
    assert answer.startswith(b"HTTP/1.1 413")
    assert_alive(live)


def test_an_image_over_the_limit(live: LiveGateway, engine: Any) -> None:
    """32 MiB is more than this gateway's bodies may have; the limit of one image is checked by its own."""
    limits = ImageLimits(max_bytes=1000)
    with open_gateway(engine("nvlm-h-tiny"), GatewayOptions(image_limits=limits)) as small:
        error = small.chat([image_part(IMAGE + bytes(1000))]).error
        assert (error["code"], "at most 1000" in error["message"]) == ("invalid_image", True)


def test_headers_without_a_body(engine: Any) -> None:
    with open_gateway(engine("nvlm-h-tiny"), GatewayOptions(body_seconds=0.3)) as hasty:
        answer = raw(hasty, f"POST {CHAT} HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: 50\n\n")
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"code":"request_timeout"' in answer
        assert_alive(hasty)


def test_a_client_that_leaves_in_the_middle_of_its_body(live: LiveGateway) -> None:
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{{"
        connection.sendall(head.encode())
    assert_alive(live)


def test_bytes_that_are_no_http(live: LiveGateway) -> None:
    assert raw(live, "\x16\x03\x01 hello\nConnection: close\n\n").startswith(b"HTTP/1.1 400")
    assert_alive(live)


# --- too many ---------------------------------------------------------------------------------------------------------


def test_64_at_once(live: LiveGateway) -> None:
    """More than the slots and the queue hold: each is answered, or refused with a status of its own and Retry-After."""
    with ThreadPoolExecutor(64) as pool:
        replies = list(pool.map(lambda i: live.chat(f"Count to {i}", max_tokens=64, ignore_eos=True), range(64)))
    refused = [reply for reply in replies if reply.status != 200]
    assert len(replies) - len(refused) >= MAX_QUEUE
    assert refused, "64 requests fit; let fewer wait"
    for reply in refused:
        assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (429, "queue_full", "1")
    assert_alive(live)


def test_a_full_queue_is_told_before_a_stream_begins(live: LiveGateway) -> None:
    body = live.body(**ENDLESS, stream=True)
    with contextlib.ExitStack() as waiting:
        for number in range(1, 8 + MAX_QUEUE + 1):
            waiting.enter_context(live.begin(body))
            wait_until(lambda number=number: live.active + live.queued == number, f"{number} requests are there")
        reply = live.chat("Hi", stream=True)
        assert (reply.status, reply.error["code"]) == (429, "queue_full")
    live.wait_until_idle()
    assert_alive(live)


def test_before_the_engine_is_there() -> None:
    with GatewayServer(GatewayOptions()) as server:
        server.start()
        live = LiveGateway(int(server.address.rpartition(":")[2]), "m", server, None)  # type: ignore[arg-type]
        assert live.call("GET", "/health").status == 200
        assert live.call("GET", "/health/ready").status == 503
        for reply in (live.chat(), live.call("GET", "/v1/models")):
            assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (
                503,
                "service_unavailable",
                "1",
            )


# --- checks -----------------------------------------------------------------------------------------------------------


def assert_refused(live: LiveGateway, path: str, body: Any, status: int, code: str, word: str) -> dict[str, Any]:
    reply = live.post(path, body)
    error = reply.error
    assert (reply.status, error["code"]) == (status, code), error
    assert word in error["message"], error
    assert_alive(live)
    return error


def assert_alive(live: LiveGateway) -> None:
    assert live.call("GET", "/health/ready").status == 200
    assert threading.active_count() < 400
    assert live.chat("Hi", max_tokens=1).status == 200
