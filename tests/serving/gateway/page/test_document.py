"""The page as it is served: one document, its policy, no key, and --no-ui. Needs no browser."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
from command_line import Run, assert_one_line_error
from gateway_calls import Reply
from live_gateway import LiveGateway, open_gateway

from nvlm_trt.serving.gateway.auth import ApiKeys
from nvlm_trt.serving.gateway.gateway import GatewayOptions

SOURCES = Path(str(resources.files("nvlm_trt.serving.gateway.page")))


@pytest.fixture(scope="module")
def reply(live: LiveGateway) -> Reply:
    return live.call("GET", "/")


def policy(reply: Reply) -> dict[str, str]:
    directives = reply.headers["content-security-policy"].split("; ")
    return dict(directive.partition(" ")[::2] for directive in directives)


def test_the_policy_allows_this_style_and_this_script_alone(reply: Reply) -> None:
    allowed = policy(reply)
    document = reply.body.decode()
    for name, element in (("script-src", r"<script[^>]*>(.*?)</script>"), ("style-src", r"<style>(.*?)</style>")):
        (text,) = re.findall(element, document, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert allowed.pop(name) == f"'sha256-{digest}'"
    assert allowed == {
        "default-src": "'none'",
        "img-src": "data: blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }


def test_nothing_is_loaded_from_elsewhere(reply: Reply) -> None:
    document = reply.body.decode()
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert set(re.findall(r"https?://[^/'\"]+", document)) == {"http://www.w3.org"}  # the namespace of SVG
    assert not re.search(r"\b(src|href)=\"(?!data:)", document)
    for code in (r"(inner|outer|Adjacent)HTML", r"document\.write", r"eval\(", "new Function", r"import\(", "^import "):
        assert not re.search(code, document, re.MULTILINE), code


def test_all_scripts_are_in_the_document(reply: Reply) -> None:
    scripts = [path for path in SOURCES.rglob("*.js") if path.is_file()]
    assert len(scripts) > 5
    for path in scripts:
        assert path.read_text() in reply.body.decode()
        assert max(map(len, path.read_text().splitlines())) <= 120, path


def test_no_key_is_needed_and_head_is_answered(engine: Callable[[str], Path]) -> None:
    with open_gateway(engine("nvlm-h-tiny"), GatewayOptions(keys=ApiKeys(["key"]))) as closed:
        assert closed.call("GET", "/").status == 200
        head = closed.call("HEAD", "/")
        assert (head.status, head.body) == (200, b"")
        assert closed.call("GET", "/v1/models").status == 401


def test_it_can_be_left_out(
    live: LiveGateway, engine: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with open_gateway(engine("nvlm-h-tiny"), GatewayOptions(has_page=False)) as bare:
        assert bare.call("GET", "/").error["code"] == "not_found"
        assert bare.call("GET", "/v1/models").status == 200
        bare.server.announce()
        assert capsys.readouterr().out == f"OpenAI endpoint at {bare.url}\n"
    live.server.announce()
    assert capsys.readouterr().out == f"OpenAI endpoint at {live.url}\npage to try it at {live.url[:-2]}\n"


def test_the_option(run_cli: Run) -> None:
    message = "an option of the OpenAI endpoint has no effect without one"
    assert_one_line_error(run_cli("serve", "engine", "--no-ui"), message)
    assert_one_line_error(run_cli("gateway", "--engine", "/nowhere", "--no-ui"), "/nowhere is not an engine")
