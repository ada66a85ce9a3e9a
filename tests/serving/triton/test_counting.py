"""Tests how requests are counted that are not answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from fake_pb_utils import ResponseSender, fake_pb_utils

from nvlm_trt.api import ChatRequest, Message, PromptCount
from nvlm_trt.errors import ImageError, QueueFullError
from nvlm_trt.lane import AbandonedError, IsOver
from nvlm_trt.serving.chat_tensors import decode_count, decode_error
from nvlm_trt.serving.triton.models.counting import Counting
from nvlm_trt.serving.triton.models.responses import Responses

CHAT = ChatRequest([Message("user", "Hi")])
COUNT = PromptCount(5, 0, 0, ())


def counting(count: Callable[[ChatRequest, IsOver], PromptCount]) -> Counting:
    pb_utils = fake_pb_utils()
    return Counting(pb_utils, Responses(pb_utils), count)


def test_the_only_response_is_the_count() -> None:
    sender, counts = ResponseSender(), counting(lambda chat, is_over: COUNT)
    counts.answer(sender, CHAT, 7)
    counts.close()
    ((response, _),) = sender.sent
    assert sender.ended
    assert decode_count(response.tensors["count"].as_numpy()) == COUNT
    assert counts.held_image_bytes == 0


def test_an_error_is_told() -> None:
    def fail(chat: ChatRequest, is_over: IsOver) -> PromptCount:
        raise ImageError("image 1: broken")

    sender, counts = ResponseSender(), counting(fail)
    counts.answer(sender, CHAT, 7)
    counts.close()
    ((response, _),) = sender.sent
    assert str(decode_error(response.error().message())) == "image 1: broken"
    assert counts.held_image_bytes == 0


def test_a_client_that_leaves_ends_the_count() -> None:
    def wait(chat: ChatRequest, is_over: IsOver) -> PromptCount:
        while not is_over():
            time.sleep(0.001)
        raise AbandonedError

    sender, counts = ResponseSender(), counting(wait)
    counts.answer(sender, CHAT, 7)
    assert counts.held_image_bytes == 7
    sender.cancelled = True
    counts.close()
    assert [response for response, _ in sender.sent] == [None]
    assert sender.ended


def test_few_wait() -> None:
    go_on = threading.Event()

    def wait(chat: ChatRequest, is_over: IsOver) -> PromptCount:
        go_on.wait()
        return COUNT

    counts, senders = counting(wait), [ResponseSender() for _ in range(64)]
    for sender in senders:
        counts.answer(sender, CHAT, 1)
    with pytest.raises(QueueFullError, match="64 requests wait to be counted"):
        counts.answer(ResponseSender(), CHAT, 1)
    assert counts.held_image_bytes == 64
    go_on.set()
    counts.close()
    assert all(sender.ended for sender in senders)
