"""Schemathesis makes requests of what /openapi.json says: no answer is a 500, and errors have the form of errors."""

from __future__ import annotations

from typing import Any

import pytest
from gateway_calls import CHAT, COUNT, image_part, png
from hypothesis import HealthCheck, Phase, given, settings
from live_gateway import LiveGateway

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis: pip install 'nvlm-trt[test]'")

EXAMPLES = 30
ENDPOINTS = {
    *(("GET", path) for path in ("/health", "/health/ready", "/v1/models", "/v1/models/{name}", "/metrics")),
    ("HEAD", "/metrics"),
    *(("POST", path) for path in (CHAT, COUNT, "/v1/completions")),
}


@pytest.fixture(scope="module")
def operations(live: LiveGateway) -> dict[tuple[str, str], Any]:
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{live.port}/openapi.json")
    found = [result.ok() for result in schema.get_all_operations()]
    return {(operation.method.upper(), operation.path): operation for operation in found}


def test_every_endpoint_is_described(operations: dict[tuple[str, str], Any]) -> None:
    assert operations.keys() == ENDPOINTS


@pytest.mark.parametrize(
    ("endpoint", "mode"),
    # there is nothing to get wrong in the others
    [(endpoint, "positive") for endpoint in sorted(ENDPOINTS)]
    + [(endpoint, "negative") for endpoint in sorted(ENDPOINTS) if endpoint[0] == "POST"],
    ids=str,
)
def test_no_answer_is_a_server_error(
    live: LiveGateway, operations: dict[tuple[str, str], Any], endpoint: tuple[str, str], mode: str
) -> None:
    statuses = []

    @settings(max_examples=EXAMPLES, phases=[Phase.generate], suppress_health_check=list(HealthCheck), derandomize=True)
    @given(case=operations[endpoint].as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def call(case: Any) -> None:
        if mode == "positive":
            make_answerable(live, case.body)
        response = case.call(timeout=60)
        statuses.append(response.status_code)
        assert response.status_code < 500, response.text
        if response.status_code >= 400 and response.text:
            assert response.json().keys() == {"error"}, response.text

    call()
    if mode == "positive" and endpoint != ("GET", "/v1/models/{name}"):
        assert 200 in statuses


def make_answerable(live: LiveGateway, body: Any) -> None:
    """Let a generated body reach the engine: with the model's name, few tokens, roles in order, and images for URLs."""
    if not isinstance(body, dict):  # GET
        return
    body["model"] = live.model
    if body.get("max_tokens") is None:
        body["max_tokens"] = 4
    for name in ("max_tokens", "max_completion_tokens", "n", "max_tiles"):
        if isinstance(body.get(name), int) and body[name] > 4:
            body[name] = 4
    if "messages" in body:
        body["messages"] = [message for message in body["messages"] if message["role"] in ("user", "assistant")]
        body["messages"].append({"role": "user", "content": "Hi"})
    for message in body.get("messages", ()):
        for part in message["content"] if isinstance(message["content"], list) else ():
            if "image_url" in part:
                part["image_url"] = image_part(png())["image_url"]
