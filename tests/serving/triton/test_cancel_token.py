"""Tests by which tokens requests are cancelled, without a server; tests/integration cancels in a real one."""

from __future__ import annotations

import json
import string
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from fake_pb_utils import FINAL, Request, ResponseSender, fake_pb_utils, strings
from hypothesis import given
from hypothesis import strategies as st

from nvlm_trt.api import ChatRequest, Delta, Message, PromptCount, SamplingParams
from nvlm_trt.errors import RequestError
from nvlm_trt.lane import AbandonedError, IsOver
from nvlm_trt.runtime.request import Request as RuntimeRequest
from nvlm_trt.serving.triton.models.answer_sender import AnswerSender, Event
from nvlm_trt.serving.triton.models.cancel_token import Tokens, read_tokens
from nvlm_trt.serving.triton.models.chat_request import read_chat
from nvlm_trt.serving.triton.models.counting import Counting
from nvlm_trt.serving.triton.models.responses import Responses

TOKEN, OTHER = "0123456789abcdef" * 2, "f" * 32
CHARACTERS = string.ascii_letters + string.digits + "_-"


def with_parameters(inputs: dict[str, np.ndarray] | None = None, **parameters: Any) -> Request:
    return Request(beside={"parameters": json.dumps(parameters)}, **(inputs or {}))


# --- parameters --------------------------------------------------------------------------------------------------


def test_tokens_are_read() -> None:
    assert read_tokens(Request(prompt=strings(b"Hi"))) == Tokens(None, None)
    named = with_parameters({"prompt": strings(b"Hi")}, cancel_token=TOKEN)
    assert read_tokens(named) == Tokens(TOKEN, None)
    assert read_chat(fake_pb_utils(), named, lambda tensor: tensor).messages == [Message("user", "Hi")]
    assert read_tokens(with_parameters(cancel=TOKEN)) == Tokens(None, TOKEN)


@given(st.text(CHARACTERS, min_size=32, max_size=128))
def test_every_token_of_the_alphabet_is_read(token: str) -> None:
    assert read_tokens(with_parameters(cancel_token=token)).own == token


@pytest.mark.parametrize("name", ["cancel_token", "cancel"])
@given(
    token=st.one_of(
        st.text(CHARACTERS, max_size=31),
        st.text(CHARACTERS, min_size=129, max_size=200),
        st.text(min_size=32, max_size=128).filter(lambda token: not set(token) <= set(CHARACTERS)),
        st.integers(),
        st.booleans(),
    )
)
def test_anything_else_is_refused_in_one_short_line(name: str, token: Any) -> None:
    with pytest.raises(RequestError, match=f"request parameter '{name}' is .* no token of 32 to 128") as caught:
        read_tokens(with_parameters(**{name: token}))
    assert len(str(caught.value)) < 250
    assert "\n" not in str(caught.value)


def test_other_parameters_stay_refused() -> None:
    with pytest.raises(RequestError, match="unknown request parameter 'x'"):
        read_tokens(with_parameters(cancel_token=TOKEN, x=1))


@pytest.mark.parametrize(
    "request_",
    [with_parameters({"prompt": strings(b"Hi")}, cancel=TOKEN), with_parameters(cancel=TOKEN, cancel_token=OTHER)],
)
def test_a_request_that_cancels_asks_for_nothing_else(request_: Request) -> None:
    with pytest.raises(RequestError, match="'cancel' asks for nothing else"):
        read_tokens(request_)


# --- answers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def answers() -> Iterator[AnswerSender]:
    pb_utils = fake_pb_utils()
    sender = AnswerSender(pb_utils, Responses(pb_utils), lambda tokens: None)
    yield sender
    sender.close()


class Asked:
    """One request that an AnswerSender answers."""

    def __init__(self, answers: AnswerSender, token: str | None) -> None:
        self.sender = ResponseSender()
        self.request = RuntimeRequest(SamplingParams(), print, print)
        self.put: Callable[[Event], None]
        answers.answer(self.sender, self._submit, token=token)

    def _submit(self, put: Callable[[Event], None]) -> RuntimeRequest:
        self.put = put
        return self.request


def test_a_token_cancels_its_requests_and_no_others(answers: AnswerSender) -> None:
    named, again, other, without = (Asked(answers, token) for token in (TOKEN, TOKEN, OTHER, None))
    answers.cancel(TOKEN[:-1] + "0")
    assert not any(asked.request.cancelled for asked in (named, again, other, without))
    answers.cancel(TOKEN)
    assert [asked.request.cancelled for asked in (named, again, other, without)] == [True, True, False, False]


def test_a_request_cancelled_by_its_token_ends_with_an_empty_response(answers: AnswerSender) -> None:
    asked = Asked(answers, TOKEN)
    answers.cancel(TOKEN)
    asked.put(Delta("late", [1]))
    asked.put(Delta("", [], finish_reason="cancelled"))
    deadline = time.monotonic() + 20
    while answers.open_requests:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert asked.sender.sent == [(None, FINAL)]


def test_a_token_cancels_a_count() -> None:
    def wait(chat: ChatRequest, is_over: IsOver) -> PromptCount:
        while not is_over():
            time.sleep(0.001)
        raise AbandonedError

    pb_utils = fake_pb_utils()
    counting, sender = Counting(pb_utils, Responses(pb_utils), wait), ResponseSender()
    counting.answer(sender, ChatRequest([Message("user", "Hi")]), 7, TOKEN)
    counting.cancel(OTHER)
    assert counting.held_image_bytes == 7
    counting.cancel(TOKEN)
    counting.close()
    assert sender.sent == [(None, FINAL)]
    assert counting.held_image_bytes == 0
