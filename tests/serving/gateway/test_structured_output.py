"""Answers fit what requests bind them to, by OpenAI's response_format, vLLM's structured_outputs, OpenAI's client."""

from __future__ import annotations

import enum
import json
import re
from typing import Any

import pytest
from gateway_calls import CHAT, Reply, image_part, png, text_part
from jsonschema import Draft202012Validator
from live_gateway import LiveGateway
from pydantic import BaseModel, Field

CONTENT = [image_part(png(1)), text_part("What is the total?")]
SCHEMA = {
    "type": "object",
    "properties": {"total": {"type": "number", "minimum": 0, "maximum": 99}, "currency": {"enum": ["EUR", "CHF"]}},
    "required": ["total", "currency"],
    "additionalProperties": False,
}


def schema_format(schema: Any = SCHEMA, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "bill", "schema": schema, **fields}}


def content(reply: Reply) -> str:
    assert reply.status == 200, reply.body
    (choice,) = reply.json["choices"]
    assert choice["finish_reason"] == "stop"
    return str(choice["message"]["content"])


@pytest.mark.parametrize("fields", [{}, {"strict": True}, {"strict": False, "description": "a bill"}])
def test_a_schema(live: LiveGateway, fields: dict[str, Any]) -> None:
    reply = live.chat(CONTENT, max_tokens=300, response_format=schema_format(**fields))
    Draft202012Validator(SCHEMA).validate(json.loads(content(reply)))


def test_a_stream(live: LiveGateway) -> None:
    body = live.body(CONTENT, max_tokens=300, response_format=schema_format(), logprobs=True, top_logprobs=2)
    whole = live.post(CHAT, body).json["choices"][0]
    events = [event["choices"][0] for event in live.events(body)]
    assert "".join(event["delta"].get("content", "") for event in events) == whole["message"]["content"]
    assert events[-1]["finish_reason"] == "stop"
    assert [token for event in events if event["logprobs"] for token in event["logprobs"]["content"]] == (
        whole["logprobs"]["content"]
    )


def test_a_json_object(live: LiveGateway) -> None:
    quotes = {str(ord('"')): 8, str(ord("}")): 9}  # a random model writes long strings
    reply = live.chat("Hi", max_tokens=900, response_format={"type": "json_object"}, logit_bias=quotes)
    assert isinstance(json.loads(content(reply)), dict)


OUTPUTS: dict[str, tuple[Any, str]] = {
    "regex": (r"[A-Z]{3} [0-9]{1,3}\.[0-9]{2}", r"[A-Z]{3} [0-9]{1,3}\.[0-9]{2}"),
    "choice": (["tea", "rice", "tea with milk"], "tea|rice|tea with milk"),
    "json": ({"type": "integer", "minimum": 10, "maximum": 99}, "[1-9][0-9]"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_structured_outputs(live: LiveGateway, kind: str) -> None:
    value, pattern = OUTPUTS[kind]
    sampled = {"temperature": 1.5, "seed": 3, "n": 3, "max_tokens": 60}
    reply = live.chat("Hi", structured_outputs={kind: value}, **sampled)
    assert reply.status == 200, reply.body
    texts = [choice["message"]["content"] for choice in reply.json["choices"]]
    assert all(re.fullmatch(pattern, text) for text in texts), texts
    body = {"model": live.model, "prompt": "Hi", "max_tokens": 60, "structured_outputs": {kind: value}}
    choice = live.post("/v1/completions", body).json["choices"][0]
    assert re.fullmatch(pattern, choice["text"]), choice
    assert choice["finish_reason"] == "stop"


def test_a_schema_for_a_text_completion(live: LiveGateway) -> None:
    body = {"model": live.model, "prompt": "Hi", "max_tokens": 300, "response_format": schema_format()}
    Draft202012Validator(SCHEMA).validate(json.loads(live.post("/v1/completions", body).json["choices"][0]["text"]))


# --- what is refused -------------------------------------------------------------------------------------------------

# what is wrong -> fields, the parameter that is named, words of the message
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a schema without a name": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format.json_schema.name",
        "missing",
    ),
    "a name with a space": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
        "response_format.json_schema.name",
        "pattern",
    ),
    "a schema that is a text": (
        {"response_format": schema_format("{}")},
        "response_format.json_schema.schema",
        "dictionary",
    ),
    "a misspelt key": ({"response_format": schema_format(scheme={})}, "response_format.json_schema.scheme", "unknown"),
    "an unknown type": ({"response_format": {"type": "xml"}}, "response_format", "'json_object'"),
    "an impossible schema": (
        {"response_format": schema_format({"type": "integer", "minimum": 3, "maximum": 1})},
        "response_format",
        "cannot be followed: Unsatisfiable schema: minimum (3) is greater than maximum (1)",
    ),
    "a schema without an end": ({"response_format": schema_format({"$ref": "#"})}, "response_format", "without an end"),
    "a keyword that is not kept": (
        {"response_format": schema_format({"type": "array", "uniqueItems": True})},
        "response_format",
        'Unimplemented keys: ["uniqueItems"]',
    ),
    "a schema that is too large": (
        {"response_format": schema_format({"enum": ["x" * 200_000]})},
        "response_format",
        "at most 131072 are allowed",
    ),
    "ten gigabytes": ({"structured_outputs": {"regex": "a{100000000}"}}, "structured_outputs.regex", "at most 2000"),
    "no expression": ({"structured_outputs": {"regex": "["}}, "structured_outputs.regex", "unclosed character class"),
    "a choice of nothing": ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "1 to 4096 texts"),
    "nothing": ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    "two": ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs", "exactly one"),
    "both ways": (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
        "send one of them",
    ),
    "a grammar": ({"structured_outputs": {"grammar": "a"}}, "structured_outputs.grammar", "unknown parameter"),
    "an older name": ({"guided_regex": "a"}, "guided_regex", '"structured_outputs": {"regex": ...}'),
    "no end": ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos", "where the answer ends"),
    "every token banned": (
        {"structured_outputs": {"regex": "a"}, "logit_bias": {str(token): -100 for token in range(256)}},
        "logit_bias",
        "bans every token that constraint allows",
    ),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(live: LiveGateway, name: str, stream: bool) -> None:
    fields, parameter, words = REFUSED[name]
    reply = live.chat("Hi", stream=stream, **fields)
    error = reply.error
    assert reply.status == 400
    assert error["param"] == parameter, error
    assert words in error["message"], error
    live.wait_until_idle()
    assert content(live.chat("Hi", structured_outputs={"choice": ["alive"]})) == "alive"


# --- OpenAI's own client ---------------------------------------------------------------------------------------------


class Currency(enum.Enum):
    EUR = "EUR"
    CHF = "CHF"


class Item(BaseModel):
    what: str = Field(max_length=12)
    price: float = Field(ge=0, le=99)


class Bill(BaseModel):
    items: list[Item] = Field(max_length=2)
    currency: Currency
    is_paid: bool
    tip: int | None = Field(ge=0, le=9)


@pytest.fixture(scope="module")
def client(live: LiveGateway) -> Any:
    openai = pytest.importorskip("openai", reason="needs openai: pip install 'nvlm-trt[test]'")
    return openai.OpenAI(base_url=live.url, api_key="none", max_retries=0)


def ask(live: LiveGateway, **fields: Any) -> dict[str, Any]:
    return {"model": live.model, "messages": [{"role": "user", "content": CONTENT}], "max_tokens": 600, **fields}


@pytest.mark.parametrize("temperature", [0, 1])
def test_openai_parses_into_a_model(client: Any, live: LiveGateway, temperature: float) -> None:
    answer = client.chat.completions.parse(**ask(live, temperature=temperature, seed=1), response_format=Bill)
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    bill = choice.message.parsed
    assert isinstance(bill, Bill)
    assert Bill.model_validate_json(choice.message.content) == bill


def test_openai_streams_into_a_model(client: Any, live: LiveGateway) -> None:
    with client.chat.completions.stream(**ask(live), response_format=Bill) as stream:
        kinds = {event.type for event in stream}
        parsed = stream.get_final_completion().choices[0].message.parsed
    assert {"content.delta", "content.done"} <= kinds
    assert parsed == client.chat.completions.parse(**ask(live), response_format=Bill).choices[0].message.parsed


def test_openai_formats(client: Any, live: LiveGateway) -> None:
    answer = client.chat.completions.create(**ask(live), response_format=schema_format(strict=True))
    Draft202012Validator(SCHEMA).validate(json.loads(answer.choices[0].message.content))
    chosen = client.chat.completions.create(**ask(live), extra_body={"structured_outputs": {"choice": ["tea", "rice"]}})
    assert chosen.choices[0].message.content in ("tea", "rice")


def test_openai_tells_what_is_wrong(client: Any, live: LiveGateway) -> None:
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**ask(live), response_format=schema_format({"type": "text"}))
    assert refused.value.param == "response_format"
    assert "Invalid type: text" in refused.value.message


def test_langchain_returns_a_model(live: LiveGateway) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="needs langchain-openai: pip install 'nvlm-trt[test]'")
    chat = langchain.ChatOpenAI(base_url=live.url, api_key="none", model=live.model, max_tokens=600, max_retries=0)
    assert isinstance(chat.with_structured_output(Bill, method="json_schema").invoke("What is the total?"), Bill)
