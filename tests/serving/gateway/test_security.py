"""API keys, the refusal to serve strangers by accident, and CORS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import Run, assert_one_line_error
from gateway_calls import CHAT, COUNT
from hypothesis import given
from hypothesis import strategies as st
from live_gateway import LiveGateway, open_gateway

from nvlm_trt.errors import NvlmError, ServerError
from nvlm_trt.serving.gateway.auth import KEY_VARIABLE, ApiKeys, read_keys
from nvlm_trt.serving.gateway.gateway import GatewayOptions
from nvlm_trt.serving.gateway.server import GatewayServer

PRIVATE = ("/metrics", "/openapi.json", "/v1/models", "/v1/models/x", "/v1/completions", CHAT, COUNT, "/nothing")


@pytest.fixture(scope="module")
def closed(engine: Callable[[str], Path]) -> Iterator[LiveGateway]:
    options = GatewayOptions(keys=ApiKeys(["first-key", "second"]), cors_origins=["https://page.example"])
    with open_gateway(engine("nvlm-d-tiny"), options) as gateway:
        yield gateway


@pytest.mark.parametrize("path", PRIVATE)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE"])
def test_every_path_needs_a_key(closed: LiveGateway, path: str, method: str) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "first-key"},
        {"Authorization": "Bearer "},
    ):
        reply = closed.call(method, path, **headers)
        assert reply.status == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        if method != "HEAD":
            assert reply.error["code"] == "invalid_api_key"


def test_health_needs_none(closed: LiveGateway) -> None:
    assert closed.call("GET", "/health").status == 200
    assert closed.call("GET", "/health/ready").status == 200


@pytest.mark.parametrize("key", ["Bearer first-key", "bearer second", "BEARER  second"])
def test_each_key_opens(closed: LiveGateway, key: str) -> None:
    assert closed.post(CHAT, closed.body(), authorization=key).status == 200


def test_cors_is_for_the_named_origin(closed: LiveGateway) -> None:
    asks = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization,content-type"}
    allowed = closed.call("OPTIONS", CHAT, Origin="https://page.example", **asks)
    assert (allowed.status, allowed.headers["access-control-allow-origin"]) == (200, "https://page.example")
    refused = closed.call("OPTIONS", CHAT, Origin="https://other.example", **asks)
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (400, None)


def test_cors_is_off(live: LiveGateway) -> None:
    reply = live.call("OPTIONS", CHAT, Origin="https://page.example", Access_Control_Request_Method="POST")
    assert reply.headers["access-control-allow-origin"] is None
    assert live.post(CHAT, live.body(), Origin="https://page.example").headers["access-control-allow-origin"] is None


@given(st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3), st.text("ab ", max_size=4))
def test_a_key_opens_exactly_if_it_is_one_of_them(keys: list[str], sent: str) -> None:
    is_one = sent.strip() in keys
    assert ApiKeys(keys).accept(b"Bearer " + sent.encode()) == (is_one or not keys)


@pytest.mark.parametrize("host", ["0.0.0.0"])
def test_a_host_that_others_reach_needs_a_key(host: str) -> None:
    with pytest.raises(NvlmError, match="without a key"):
        GatewayServer(GatewayOptions(host=host))
    GatewayServer(GatewayOptions(host=host), no_auth=True).close()
    GatewayServer(GatewayOptions(host=host, keys=ApiKeys(["k"]))).close()


def test_a_port_in_use(live: LiveGateway) -> None:
    with pytest.raises(ServerError, match=f"port {live.port} of 127.0.0.1 is in use"):
        GatewayServer(GatewayOptions(port=live.port))


def test_keys_of_options_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("of-file\n\n  other \n")
    monkeypatch.setenv(KEY_VARIABLE, "of-environment")
    keys = read_keys(["of-option"], file)
    for key in ("of-option", "of-file", "other", "of-environment"):
        assert keys.accept(f"Bearer {key}".encode())
    assert not keys.accept(b"Bearer ")


WRONG_KEYS: dict[str, tuple[tuple[str, ...], str]] = {
    "an empty key": (("--api-key", ""), "API key is empty"),
    "a key with a line break": (("--api-key", "a\nb"), "API key is empty or holds"),
    "a key beyond ASCII": (("--api-key", "ä"), "API key is empty or holds"),
    "no such file": (("--api-key-file", "nowhere"), "cannot read --api-key-file nowhere"),
    "a folder": (("--api-key-file", "."), "cannot read --api-key-file ."),
    "strangers": (("--host", "0.0.0.0"), "lets other machines ask without a key"),
    "neither engine nor server": ((), "pass one of --engine DIR and --url"),
    "no server there": (("--url", "grpc://127.0.0.1:9"), "no server answers at grpc://127.0.0.1:9"),
    "no engine there": (("--engine", "/nowhere"), "/nowhere is not an engine directory"),
}


@pytest.mark.parametrize("name", WRONG_KEYS)
def test_a_wrong_option_is_told_in_one_line(run_cli: Run, name: str) -> None:
    arguments, message = WRONG_KEYS[name]
    source = () if set(arguments) & {"--url", "--engine"} or not arguments else ("--engine", "/nowhere")
    assert_one_line_error(run_cli("gateway", "--port", 0, *source, *arguments), message)


def test_options_of_the_gateway_need_one(run_cli: Run, engine: Callable[[str], Path]) -> None:
    assert_one_line_error(run_cli("serve", engine("nvlm-d-tiny"), "--api-key", "k"), "pass --openai-port 8080 too")
