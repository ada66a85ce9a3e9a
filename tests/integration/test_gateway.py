"""The gateway in front of a real tritonserver, and beside one: answers, errors, cancellation, stopping."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gateway_calls import Endpoint, image_part, text_part
from live_server import ENDLESS, MAX_QUEUE, ServerByName, make_image, metric, wait_until, wait_until_idle

from nvlm_trt.api import ImagePart, Message, SamplingParams, TextPart
from nvlm_trt.serving.client import Client
from nvlm_trt.serving.gateway.gateway import GatewayOptions
from nvlm_trt.serving.gateway.server import GatewayServer
from nvlm_trt.serving.gateway.triton_source import TritonSource
from nvlm_trt.serving.triton.server import TritonServer

NAME = "nvlm-h-tiny"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(served: ServerByName) -> TritonServer:
    return served(NAME)


@pytest.fixture(scope="module")
def endpoint(server: TritonServer) -> Iterator[Endpoint]:
    with GatewayServer(GatewayOptions()) as gateway:
        gateway.start()
        assert gateway.serve(lambda: TritonSource.connect(server.address))
        yield Endpoint(int(gateway.address.rpartition(":")[2]), NAME)


def test_answers_are_those_of_grpc(endpoint: Endpoint, server: TritonServer) -> None:
    image = make_image(1)
    question = Message("user", [TextPart("A"), ImagePart(image, 2), TextPart("B")])
    sampling = SamplingParams(24, temperature=1.0, seed=3, n=2, logprobs=2)
    with Client(server.address) as client:
        expected = client.generate_all(messages=[question], sampling=sampling, max_tiles=None)
    body = endpoint.body([text_part("A"), image_part(image), text_part("B")], max_tokens=24, temperature=1, seed=3, n=2)
    reply = endpoint.post(CHAT, {**body, "logprobs": True, "top_logprobs": 2, "max_tiles": 2}).json
    assert [choice["message"]["content"] for choice in reply["choices"]] == [answer.text for answer in expected]
    usage = expected[0].usage
    assert usage is not None
    assert reply["usage"]["prompt_tokens"] == usage.prompt_tokens
    assert reply["usage"]["prompt_tokens_details"]["image_tiles"] == usage.image_tiles == 3
    for choice, answer in zip(reply["choices"], expected, strict=True):
        logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
        assert logprobs == [token.logprob for token in answer.logprobs][: len(logprobs)]


def test_tokens_are_counted_by_the_server(endpoint: Endpoint) -> None:
    body = endpoint.body([image_part(make_image(2)), text_part("?"), image_part(make_image(3), detail="low")])
    counted = endpoint.post(f"{CHAT}/input_tokens", body).json
    usage = endpoint.post(CHAT, {**body, "max_tokens": 1}).json["usage"]
    assert counted["input_tokens"] == usage["prompt_tokens"]
    assert [image["tiles"] for image in counted["images"]] == [7, 1]
    assert counted["input_tokens_details"]["image_tiles"] == usage["prompt_tokens_details"]["image_tiles"]


ERRORS: dict[str, tuple[Any, dict[str, Any], int, str]] = {
    "no image": ([image_part(b"this is no image")], {}, 400, "invalid_image"),
    "a truncated image": ([image_part(make_image(1)[:200])], {"stream": True}, 400, "invalid_image"),
    "too many tokens": ("word " * 2000, {}, 400, "context_length_exceeded"),
    "too many image tokens": (
        [image_part(make_image(i, 300, 200)) for i in range(12)],
        {},
        400,
        "context_length_exceeded",
    ),
    "an empty prompt": ("", {}, 400, "invalid_request"),
    "an id beyond the vocabulary": ("Hi", {"logit_bias": {"99999": 1}}, 400, "invalid_value"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("path", [CHAT, f"{CHAT}/input_tokens"], ids=["chat", "count"])
def test_errors_keep_their_kind(endpoint: Endpoint, name: str, path: str) -> None:
    content, fields, status, code = ERRORS[name]
    if path != CHAT and "logit_bias" in fields:
        pytest.skip("nothing is sampled")
    reply = endpoint.post(path, endpoint.body(content, **fields))
    assert (reply.status, reply.error["code"]) == (status, code), reply.body


def test_a_client_that_leaves_frees_its_slot(endpoint: Endpoint, server: TritonServer) -> None:
    wait_until_idle(server)
    late = metric(server, "nvlm_late_tokens_total")
    with endpoint.begin(endpoint.body(**ENDLESS, stream=True)) as connection:
        wait_until(lambda: metric(server, "nvlm_active_slots") == 1, "the request has a slot")
        connection.recv(100)
    wait_until_idle(server)
    assert metric(server, "nvlm_late_tokens_total") - late <= 1


def test_a_full_queue(endpoint: Endpoint, server: TritonServer) -> None:
    wait_until_idle(server)
    with contextlib.ExitStack() as waiting:
        for number in range(1, 8 + MAX_QUEUE + 1):
            waiting.enter_context(endpoint.begin(endpoint.body(**ENDLESS, stream=True)))
            wait_until(lambda number=number: metric(server, "nvlm_open_requests") == number, f"{number} requests")
        reply = endpoint.post(CHAT, endpoint.body(stream=True))
        assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (429, "queue_full", "1")
    wait_until_idle(server)


# --- beside a server --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serve(engine: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], Endpoint]]:
    ports = [part for name in ("grpc", "http", "metrics", "openai") for part in (f"--{name}-port", "0")]
    command = [sys.executable, "-m", "nvlm_trt.cli", "serve", str(engine), *ports, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("OpenAI endpoint at http://127.0.0.1:"), line
            port = int(line.rpartition(":")[2].removesuffix("/v1\n"))
            assert process.stdout.readline() == f"page to try it at http://127.0.0.1:{port}/\n"
            assert process.stdout.readline().startswith("serving at grpc://")
            yield process, Endpoint(port, NAME)
        finally:
            process.kill()


def test_serve_with_an_openai_port(engine: Callable[[str], Path]) -> None:
    """A signal drains both: the open answer is finished, readiness is gone, and everything ends with status 0."""
    with serve(engine(NAME), "--served-model-name", "a", "--served-model-name", "b/c") as (process, endpoint):
        assert endpoint.call("GET", "/health/ready").status == 200
        assert [card["id"] for card in endpoint.call("GET", "/v1/models").json["data"]] == ["a", "b/c"]
        assert endpoint.call("GET", "/v1/models/b/c").json["id"] == "b/c"
        assert endpoint.post(CHAT, endpoint.body()).error["code"] == "model_not_found"
        body = {**endpoint.body(max_tokens=600, ignore_eos=True, stream=True), "model": "b/c"}
        with endpoint.begin(body) as connection:
            seen = connection.recv(1 << 12)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: endpoint.call("GET", "/health/ready").status == 503, "the gateway drains")
            while b"[DONE]" not in seen:
                piece = connection.recv(1 << 16)
                assert piece, seen[-300:]
                seen += piece
        assert b'"finish_reason":"length"' in seen
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_the_gateway_tells_when_its_server_is_gone(engine: Callable[[str], Path]) -> None:
    with TritonServer(engine(NAME)) as own, GatewayServer(GatewayOptions()) as gateway:
        gateway.start()
        assert gateway.serve(lambda: TritonSource.connect(own.address))
        endpoint = Endpoint(int(gateway.address.rpartition(":")[2]), NAME)
        with endpoint.begin(endpoint.body(**ENDLESS, stream=True)) as connection:
            seen = connection.recv(1 << 12)
            own.kill()
            while not seen.endswith(b"0\r\n\r\n"):
                piece = connection.recv(1 << 16)
                assert piece, seen[-300:]
                seen += piece
        assert b'"code":"service_unavailable"' in seen
        assert b"[DONE]" not in seen
        assert b"grpc" not in seen
        assert endpoint.call("GET", "/health").status == 200
        assert endpoint.call("GET", "/health/ready").status == 503
        reply = endpoint.post(CHAT, endpoint.body())
        assert (reply.status, reply.error["code"]) == (503, "service_unavailable")
        assert "grpc" not in reply.error["message"]
