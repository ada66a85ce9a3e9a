"""Answers over HTTP are those of the engine, and the tokens, tiles and parts are counted as the engine counts them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from gateway_calls import CHAT, COUNT, data_uri, image_part, png, text_part
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_gateway import LiveGateway

from nvlm_trt.api import Answer, ChatRequest, ImagePart, Message, SamplingParams, TextPart, merge_answers
from nvlm_trt.serving.gateway.chat_request import ChatCompletionRequest
from nvlm_trt.serving.gateway.sampling import sampling_params
from nvlm_trt.serving.gateway.source import ServedModel


def in_process(live: LiveGateway, messages: list[Message], **sampling: Any) -> Answer:
    request = ChatRequest(messages, sampling=SamplingParams(**{"max_tokens": 8, **sampling}))
    return merge_answers(list(live.pipeline.generate(request)))[0]


def user(*parts: Any) -> Message:
    return Message("user", list(parts))


def test_parts_stand_in_the_order_in_which_they_are_sent(live: LiveGateway) -> None:
    first, second = png(1), png(2, 60, 60)
    content = [text_part("A"), image_part(first), text_part("B"), image_part(second), text_part("C")]
    expected = in_process(
        live, [user(TextPart("A"), ImagePart(first), TextPart("B"), ImagePart(second), TextPart("C"))]
    )
    turned = in_process(live, [user(TextPart("A"), ImagePart(second), TextPart("B"), ImagePart(first), TextPart("C"))])
    assert expected.token_ids != turned.token_ids
    reply = live.chat(content).json
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert expected.usage is not None
    usage = reply["usage"]
    assert usage["prompt_tokens"] == expected.usage.prompt_tokens
    assert usage["completion_tokens"] == len(expected.token_ids)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    tiles = expected.usage.image_tiles
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0, "image_tokens": 2 * 16, "image_tiles": tiles}


def test_a_conversation_of_all_roles(live: LiveGateway) -> None:
    image = png(3)
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [image_part(image), text_part("What is <image>?")], "name": "ann"},
        {"role": "assistant", "content": "Noise.", "refusal": None, "tool_calls": None, "audio": None},
        {"role": "user", "content": "\\<image> are you sure?"},
    ]
    expected = in_process(
        live,
        [
            Message("system", "Be brief."),
            user(ImagePart(image), TextPart("What is <image>?")),
            Message("assistant", "Noise."),
            user(TextPart("\\<image> are you sure?")),
        ],
    )
    reply = live.post(CHAT, {**live.body(), "messages": messages}).json
    assert reply["choices"][0]["message"]["content"] == expected.text
    assert reply["usage"]["prompt_tokens"] == expected.usage.prompt_tokens


def test_detail_low_is_one_tile_of_its_image_alone(live: LiveGateway) -> None:
    wide = png(4, 336, 112)

    def tiles(*details: str, **fields: Any) -> list[int]:
        content = [image_part(wide, detail=detail) for detail in details]
        counted = live.post(COUNT, live.body(content, **fields)).json
        answered = live.chat(content, **fields).json["usage"]["prompt_tokens_details"]
        assert answered["image_tiles"] == counted["input_tokens_details"]["image_tiles"]
        return [image["tiles"] for image in counted["images"]]

    assert tiles("auto", "low", "high") == [4, 1, 4]
    assert tiles("auto", "low", max_tiles=2) == [3, 1]


def test_an_image_url_may_be_a_bare_string(live: LiveGateway) -> None:
    bare = {"type": "image_url", "image_url": data_uri(png(5))}
    same = [live.chat([part, text_part("?")]).json["choices"] for part in (bare, image_part(png(5)))]
    assert same[0] == same[1]


def test_a_stream_holds_the_whole_answer(live: LiveGateway) -> None:
    body = live.body([image_part(png(6)), text_part("What?")], max_tokens=24, n=3, temperature=1, seed=-5)
    whole = live.post(CHAT, body).json
    chunks = live.events({**body, "stream_options": {"include_usage": True}})
    texts, opened, ended = {0: "", 1: "", 2: ""}, set(), {}
    for chunk in chunks[:-1]:
        assert chunk["object"] == "chat.completion.chunk"
        assert chunk["usage"] is None
        (choice,) = chunk["choices"]
        index, delta = choice["index"], choice["delta"]
        assert index not in ended
        if delta.get("role"):
            assert index not in opened
            opened.add(index)
        assert index in opened
        texts[index] += delta.get("content", "")
        if choice["finish_reason"]:
            ended[index] = choice["finish_reason"]
    assert texts == {choice["index"]: choice["message"]["content"] for choice in whole["choices"]}
    assert ended == {choice["index"]: choice["finish_reason"] for choice in whole["choices"]}
    assert len(set(texts.values())) > 1
    assert chunks[-1]["choices"] == []
    for counts in ("prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"):
        assert chunks[-1]["usage"][counts] == whole["usage"][counts]


def test_a_stream_without_include_usage_has_none(live: LiveGateway) -> None:
    chunks = live.events(live.body("Hi"))
    assert all("usage" not in chunk for chunk in chunks)
    assert all(chunk["choices"] for chunk in chunks)


def test_continuous_usage(live: LiveGateway) -> None:
    body = live.body([image_part(png(7)), text_part("What?")], **{"max_tokens": 5, "ignore_eos": True})
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = live.events({**body, "stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == 5
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {last["usage"]["prompt_tokens"]}


def test_log_probabilities_are_those_of_the_text(live: LiveGateway) -> None:
    body = live.body("Count to ten", max_tokens=12, logprobs=True, top_logprobs=3)
    (choice,) = live.post(CHAT, body).json["choices"]
    tokens = choice["logprobs"]["content"]
    spelled = b"".join(bytes(token["bytes"]) for token in tokens)
    assert spelled.decode(errors="replace") == choice["message"]["content"]
    for token in tokens:
        top = token["top_logprobs"]
        assert len(top) == 3
        assert [other["logprob"] for other in top] == sorted((other["logprob"] for other in top), reverse=True)
        assert top[0] == {key: token[key] for key in ("token", "logprob", "bytes")}  # greedy
        assert sum(math.exp(other["logprob"]) for other in top) <= 1 + 1e-6
    streamed = [c["choices"][0]["logprobs"] for c in live.events(body)]
    assert [token for logprobs in streamed if logprobs for token in logprobs["content"]] == tokens
    alone = live.chat("Count to ten", max_tokens=12, logprobs=True).json["choices"][0]["logprobs"]["content"]
    assert [{**token, "top_logprobs": []} for token in tokens] == alone


PARAMETERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stop, one": ({"stop": "a"}, {"stop": ("a",)}),
    "stop, several": ({"stop": ["e", "a"]}, {"stop": ("e", "a")}),
    "max_completion_tokens wins": ({"max_tokens": 3, "max_completion_tokens": 20}, {"max_tokens": 20}),
    "seed": ({"temperature": 2, "seed": 7}, {"temperature": 2.0, "seed": 7}),
    "a negative seed": ({"temperature": 2, "seed": -1}, {"temperature": 2.0, "seed": 2**64 - 1}),
    "top_p": ({"temperature": 1, "seed": 1, "top_p": 0.5}, {"temperature": 1.0, "seed": 1, "top_p": 0.5}),
    "top_k": ({"temperature": 1, "seed": 1, "top_k": 4}, {"temperature": 1.0, "seed": 1, "top_k": 4}),
    "min_p": ({"temperature": 1, "seed": 1, "min_p": 0.2}, {"temperature": 1.0, "seed": 1, "min_p": 0.2}),
    "presence_penalty": ({"presence_penalty": 2}, {"presence_penalty": 2.0}),
    "frequency_penalty": ({"frequency_penalty": -1.5}, {"frequency_penalty": -1.5}),
    "repetition_penalty": ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
    "logit_bias": ({"logit_bias": {"70": 100}}, {"logit_bias": {70: 100.0}}),
    "min_tokens": ({"min_tokens": 20, "logit_bias": {"1": 50}}, {"min_tokens": 20, "logit_bias": {1: 50.0}}),
    "ignore_eos": ({"ignore_eos": True}, {"ignore_eos": True}),
    "priority": ({"priority": -3}, {"priority": -3}),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_parameter_has_its_effect(live: LiveGateway, name: str) -> None:
    fields, sampling = PARAMETERS[name]
    expected = in_process(live, [user(TextPart("Tell me a story"))], **{"max_tokens": 40, **sampling})
    (choice,) = live.chat("Tell me a story", **{"max_tokens": 40, **fields}).json["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (expected.text, expected.finish_reason)


@pytest.mark.parametrize("priority", [None, 0, -(2**31) + 1, 2**31 - 1])
def test_the_priority_reaches_the_runtime(priority: int | None) -> None:
    """tests/runtime/test_turns.py tests what the runtime does with it."""
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "priority": priority}
    fields, model = ChatCompletionRequest.model_validate(body), ServedModel("m", "", "", 99, 8, 6)
    assert sampling_params(fields, model, 5, 0).priority == (priority or 0)


def test_usage_counts_the_tokens_that_an_earlier_prompt_began_with(live: LiveGateway) -> None:
    """256 tokens are one chunk; the tokens of this engine are bytes."""
    told = "There once was a king, who had a daughter. " * 10
    first, second = (live.chat(told + question).json["usage"] for question in ("Who?", "Whose daughter?"))
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] == 256
    assert first["prompt_tokens"] < second["prompt_tokens"] == second["total_tokens"] - second["completion_tokens"]


WITHOUT_EFFECT: dict[str, Any] = {
    "user": "ann",
    "metadata": {"a": "b"},
    "store": True,
    "parallel_tool_calls": False,
    "service_tier": "auto",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "tool_choice": "none",
    "tools": None,
    "functions": None,
    "audio": None,
    "reasoning_effort": None,
    "logprobs": False,
    "stream_options": None,
    "logit_bias": None,
    "prompt_cache_key": "k",
    "safety_identifier": "s",
}


def test_parameters_without_effect(live: LiveGateway) -> None:
    plain = live.chat("Tell me a story").json["choices"]
    assert live.chat("Tell me a story", **WITHOUT_EFFECT).json["choices"] == plain
    assert live.chat("Tell me a story", tools=[{"type": "function"}], tool_choice="none").json["choices"] == plain


def test_text_completions(live: LiveGateway) -> None:
    expected = in_process(live, [user(TextPart("Tell me a story"))], max_tokens=30)
    body = {"model": live.model, "prompt": ["Tell me a story"], "max_tokens": 30, "logprobs": 2}
    reply = live.post("/v1/completions", body).json
    (choice,) = reply["choices"]
    assert reply["object"] == "text_completion"
    assert choice["text"] == expected.text
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"])
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])
    chunks = live.events(body, "/v1/completions")
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected.text
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    offsets = [o for chunk in chunks for o in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == logprobs["text_offset"]


def test_the_request_id_comes_back(live: LiveGateway) -> None:
    reply = live.post(CHAT, live.body(), x_request_id="my-id.7")
    assert reply.headers["x-request-id"] == "my-id.7"
    assert reply.json["id"] == "chatcmpl-my-id.7"
    strange = live.post(CHAT, live.body(), x_request_id="a b\tc")
    assert strange.headers["x-request-id"] != "a b\tc"


def test_models(live: LiveGateway) -> None:
    (card,) = live.call("GET", "/v1/models").json["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == (live.model, "model", 4096)
    assert card["input_modalities"] == ["text", "image"]
    assert live.call("GET", f"/v1/models/{live.model}").json == card
    assert live.call("GET", "/v1/models/other").error["code"] == "model_not_found"


def test_metrics_count_what_was_asked(live: LiveGateway) -> None:
    def value(name: str) -> float:
        lines = live.call("GET", "/metrics").body.decode().splitlines()
        return sum(
            float(line.split()[-1]) for line in lines if line.startswith(name + " ") or line.startswith(name + "{")
        )

    asked = 'nvlm_gateway_requests_total{path="/v1/chat/completions",status="200"}'
    before = value(asked), value("nvlm_gateway_completion_tokens_total")
    tokens = live.chat("Hi", ignore_eos=True).json["usage"]["completion_tokens"]
    assert (value(asked), value("nvlm_gateway_completion_tokens_total")) == (before[0] + 1, before[1] + tokens)
    assert value("nvlm_gateway_open_requests") == 0
    head = live.call("HEAD", "/metrics")
    assert (head.status, head.body) == (200, b"")


_TEXTS = st.text(max_size=30)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Conversations of several turns, whose user turns have text and images in any order."""

    def content() -> Any:
        if draw(st.booleans()):
            return draw(_TEXTS)
        sizes = st.tuples(st.integers(20, 200), st.integers(20, 200))
        images = st.builds(lambda size: image_part(png(0, *size)), sizes)
        return draw(st.lists(st.one_of(st.builds(text_part, _TEXTS), images), max_size=3))

    messages = []
    for _ in range(draw(st.integers(0, 2))):
        messages += [{"role": "user", "content": content()}, {"role": "assistant", "content": draw(_TEXTS)}]
    return [*messages, {"role": "user", "content": content()}]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversations())
def test_what_is_counted_is_what_is_answered(live: LiveGateway, messages: list[dict[str, Any]]) -> None:
    body = {**live.body(max_tokens=1), "messages": messages}
    counted, answered = live.post(COUNT, body), live.post(CHAT, body)
    assert counted.status == answered.status
    if counted.status != 200:
        assert counted.error["code"] == answered.error["code"]
        return
    usage, count = answered.json["usage"], counted.json
    assert count["input_tokens"] == usage["prompt_tokens"]
    details = dict(count["input_tokens_details"])
    assert details.pop("cross_attended_tokens") == usage["nvlm"]["cross_attended_tokens"]
    assert details == usage["prompt_tokens_details"]
    assert sum(image["tiles"] for image in count["images"]) == details["image_tiles"]
