"""Tests both ends of the socket over which a server drains."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from nvlm_trt.errors import ServerError
from nvlm_trt.serving.triton.drain_channel import ENCODED, IDLE, DrainChannel
from nvlm_trt.serving.triton.models.draining import Draining


def test_the_model_tells_when_images_are_encoded_and_when_nothing_is_open() -> None:
    answers: Any = SimpleNamespace(encoding_requests=1, open_requests=2)
    channel = DrainChannel()
    draining = Draining(os.dup(channel.descriptor), answers, lambda: None)
    with draining.admit():
        pass
    channel.tell()
    assert not channel.wait_for(ENCODED, give_up=lambda: True)
    with pytest.raises(ServerError, match="the server is stopping"), draining.admit():
        pass
    answers.encoding_requests = 0
    assert channel.wait_for(ENCODED, give_up=lambda: False)
    assert not channel.wait_for(IDLE, give_up=lambda: True)
    answers.open_requests = 0
    draining.finish()
    assert channel.wait_for(IDLE, give_up=lambda: True)


def test_a_channel_whose_model_has_ended_says_so() -> None:
    channel = DrainChannel()
    channel.close_inherited()
    channel.tell()
    assert not channel.wait_for(ENCODED, give_up=lambda: False)


def test_a_supervisor_that_ends_after_the_draining_ends_the_server() -> None:
    ended = threading.Event()
    answers: Any = SimpleNamespace(encoding_requests=0, open_requests=0)
    channel = DrainChannel()
    Draining(os.dup(channel.descriptor), answers, ended.set)
    channel.tell()
    assert channel.wait_for(IDLE, give_up=lambda: False)
    assert not ended.wait(0.2)
    channel.close()
    assert ended.wait(5)


@pytest.mark.parametrize("told", [False, True])
def test_a_server_without_a_supervisor_ends_when_nothing_is_open(told: bool) -> None:
    ended = threading.Event()
    answers: Any = SimpleNamespace(encoding_requests=0, open_requests=1)
    channel = DrainChannel()
    draining = Draining(os.dup(channel.descriptor), answers, ended.set)
    if told:
        channel.tell()
        assert channel.wait_for(ENCODED, give_up=lambda: False)
    channel.close()
    assert not ended.wait(0.2)
    with pytest.raises(ServerError, match="the server is stopping"), draining.admit():
        pass
    answers.open_requests = 0
    assert ended.wait(5)
