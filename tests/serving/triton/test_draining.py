"""Tests both ends of the socket over which a server drains."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from nvlm_trt.errors import ServerError
from nvlm_trt.serving.triton.drain_channel import ENCODED, IDLE, DrainChannel
from nvlm_trt.serving.triton.models.draining import Draining


def test_the_model_tells_when_images_are_encoded_and_when_nothing_is_open() -> None:
    answers: Any = SimpleNamespace(encoding_requests=1, open_requests=2)
    channel = DrainChannel()
    draining = Draining(os.dup(channel.descriptor), answers)
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
