"""Tests that requests, answers and errors are unchanged after encoding and decoding as tensors and messages."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvlm_trt.api import (
    Constraint,
    Delta,
    ImageCount,
    ImagePart,
    Message,
    PromptCount,
    SamplingParams,
    ScoredToken,
    TextPart,
    TokenLogprob,
    Usage,
    merge_answers,
    merge_deltas,
)
from nvlm_trt.errors import EngineError, ImageError, QueueFullError, RequestError, ServerError, TooLargeError
from nvlm_trt.serving.chat_tensors import (
    decode_count,
    decode_delta,
    decode_error,
    encode_count,
    encode_delta,
    encode_error,
    parse_conversation,
    parse_sampling,
)
from nvlm_trt.serving.grpc_messages import delta_of, infer_request

token_ids = st.integers(0, 2**31 - 1)
logprobs = st.floats(-1e3, 0)
usages = st.builds(
    Usage,
    *[st.integers(0, 10**6)] * 5,
    *[st.floats(0, 1e6)] * 2,
    st.none() | st.floats(0, 1e6),
    st.floats(0, 1e6),
)
tokens = st.builds(ScoredToken, token_ids, logprobs, st.text(), st.binary())
deltas = st.builds(
    Delta,
    text=st.text(),
    token_ids=st.lists(token_ids),
    logprobs=st.lists(
        st.builds(TokenLogprob, token_ids, logprobs, st.text(), st.binary(), st.lists(tokens, max_size=3).map(tuple)),
        max_size=3,
    ),
    finish_reason=st.sampled_from([None, "stop", "length", "cancelled"]),
    usage=st.none() | usages,
    index=st.integers(0, 65535),
)


@given(deltas)
def test_a_delta_comes_back_as_it_was(delta: Delta) -> None:
    assert decode_delta(encode_delta(delta)) == delta


@given(st.lists(deltas, min_size=1))
def test_merged_deltas_say_the_same(parts: list[Delta]) -> None:
    whole = merge_deltas(parts)
    assert whole.text == "".join(part.text for part in parts)
    assert whole.token_ids == [t for part in parts for t in part.token_ids]
    assert len(whole.logprobs) == sum(len(part.logprobs) for part in parts)
    assert (whole.finish_reason, whole.usage) == (parts[-1].finish_reason, parts[-1].usage)


@given(st.lists(deltas, max_size=12), st.integers(1, 4))
def test_merged_answers_are_apart_and_share_the_usage(parts: list[Delta], n: int) -> None:
    parts = [replace(part, index=part.index % n) for part in parts]
    answers = merge_answers(parts)
    indices = sorted({part.index for part in parts})
    assert len(answers) == len(indices)
    for index, answer in zip(indices, answers, strict=True):
        own = [part for part in parts if part.index == index]
        assert answer.text == "".join(part.text for part in own)
        assert answer.token_ids == [token_id for part in own for token_id in part.token_ids]
        assert answer.finish_reason == own[-1].finish_reason
        assert answer.usage == parts[-1].usage


def test_the_bytes_of_a_token_are_integers_as_in_openais_api() -> None:
    token = TokenLogprob(5, -0.5, "\ufffd", b"\xe2\x82", (ScoredToken(7, -0.1, "a", b"a"),))
    (written,) = json.loads(encode_delta(Delta("", [5], [token]))["logprobs"][0])
    assert written == {
        "token_id": 5,
        "logprob": -0.5,
        "token": "\ufffd",
        "bytes": [0xE2, 0x82],
        "top": [{"token_id": 7, "logprob": -0.1, "token": "a", "bytes": [97]}],
    }


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RequestError("max_tokens = -1 is not allowed"), RequestError),
        (ImageError("image 2: truncated"), RequestError),
        (TooLargeError("the prompt has 9 tokens"), TooLargeError),
        (QueueFullError("9 requests are waiting"), QueueFullError),
        (EngineError("it failed"), ServerError),
        (ServerError("stopping"), ServerError),
    ],
)
def test_an_error_keeps_its_kind_and_words(error: RequestError, expected: type[Exception]) -> None:
    decoded = decode_error(encode_error(error))
    assert type(decoded) is expected
    assert str(decoded) == str(error)
    assert type(decode_error(f"in ensemble 'nvlm_ensemble', {encode_error(error)}")) is expected


def test_an_error_of_the_server_itself_is_one_line() -> None:
    error = decode_error("Stub process 'nvlm_0_0'\n is not healthy.")
    assert isinstance(error, ServerError)
    assert str(error) == "Stub process 'nvlm_0_0' is not healthy."


def tensor(request: object, name: str) -> bytes:
    """Reads the first string of an input."""
    index = [item.name for item in request.inputs].index(name)  # type: ignore[attr-defined]
    raw = request.raw_input_contents[index]  # type: ignore[attr-defined]
    return raw[4 : 4 + int.from_bytes(raw[:4], "little")]


@given(
    st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), st.text()), min_size=1),
    st.lists(st.binary(max_size=99), max_size=3),
)
def test_a_request_says_what_it_was_given(messages: list[Message], images: list[bytes]) -> None:
    sampling = SamplingParams(3, temperature=0.5, seed=2**64 - 1, stop=("\n", "ü"), logit_bias={0: -100, 9: 0.5}, n=4)
    sampling = sampling.model_copy(update={"constraint": Constraint(json_schema={"enum": [None, "ü"]})})
    request = infer_request(messages=messages, images=images, sampling=sampling, max_tiles=2)
    assert parse_conversation(None, tensor(request, "messages")) == messages
    assert parse_sampling(tensor(request, "sampling_parameters")) == sampling
    shapes = {item.name: list(item.shape) for item in request.inputs}
    assert shapes.get("image", [0]) == [len(images)]


def test_a_part_says_how_many_tiles_its_image_may_have() -> None:
    parts = [ImagePart(max_tiles=3), TextPart("a"), ImagePart()]
    request = infer_request(messages=[Message("user", parts)], images=[b"one", b"two"])
    assert parse_conversation(None, tensor(request, "messages")) == [Message("user", parts)]


@given(st.builds(PromptCount, images=st.lists(st.from_type(ImageCount), max_size=3).map(tuple)))
def test_a_count_travels(count: PromptCount) -> None:
    assert decode_count(encode_count(count)) == count


def test_a_response_without_outputs_is_no_delta() -> None:
    from tritonclient.grpc import service_pb2

    assert delta_of(service_pb2.ModelStreamInferResponse()) is None
    with pytest.raises(RequestError, match=r"^the prompt is empty$"):
        delta_of(service_pb2.ModelStreamInferResponse(error_message="invalid request: the prompt is empty"))
