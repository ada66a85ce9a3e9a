"""Judges replies, and sees a planted leak and a differing answer of a toy server."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lab.reliability.http_cases import HTTP_KINDS
from lab.reliability.request_case import ANSWER, EITHER, REFUSAL, RequestCase
from lab.reliability.request_cases import message, request_case, strings
from lab.reliability.request_fuzz import RequestCounts, RequestFuzz, judge
from lab.reliability.wire import Reply, read_body, read_events
from nvlm_trt.errors import QueueFullError, RequestError, ServerError

LEAKING = """
import os, sys
kept = []
for line in sys.stdin:
    kept.append(os.urandom(1 << 20))
    print(flush=True)
"""
HELLO = message({"prompt": strings(b"Hello")})


class ToyTarget:
    """Stands for a server and for the connection to it; its process can leak."""

    def __init__(self, leaks: bool = False, differs_after: int | None = None) -> None:
        self._lock = threading.Lock()  # several clients share the pipe
        self.sent, self._leaks, self._differs_after = 0, leaks, differs_after
        self._process = subprocess.Popen(
            [sys.executable, "-c", LEAKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def wire(self) -> Any:
        return self

    def send_grpc(self, *_: object) -> Reply:
        with self._lock:
            self.sent += 1
            if self._leaks:
                assert self._process.stdin is not None
                assert self._process.stdout is not None
                self._process.stdin.write("\n")
                self._process.stdin.flush()
                self._process.stdout.readline()
        changed = self._differs_after is not None and self.sent > self._differs_after
        return Reply((1, 2, 4 if changed else 3))

    def is_alive(self) -> bool:
        return True

    def roles(self) -> dict[str, int]:
        return {"nvlm_0_0": self._process.pid}

    def kept(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Closes the connection, of which a toy has none."""

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def toys() -> Iterator[list[ToyTarget]]:
    made: list[ToyTarget] = []
    yield made
    for toy in made:
        toy.end()


def fuzzed(target: ToyTarget, requests: int) -> tuple[RequestCounts, list[str]]:
    counts = RequestCounts()
    course = RequestFuzz(1, counts, target, lambda seed, number: RequestCase("hello", HELLO))
    blocks = course.run(requests, 10, time.monotonic() + 60)
    return counts, [finding.fault for block in blocks for finding in block]


def test_a_flat_server_passes(toys: list[ToyTarget]) -> None:
    toys.append(ToyTarget())
    counts, faults = fuzzed(toys[0], 200)
    assert faults == []
    assert counts.answered == 200
    assert counts.leaks == []


def test_a_planted_leak_is_seen(toys: list[ToyTarget]) -> None:
    toys.append(ToyTarget(leaks=True))
    counts, _ = fuzzed(toys[0], 200)
    assert counts.leaks == ["nvlm_0_0"]
    assert counts.growth_mb["nvlm_0_0"] > 80


def test_a_planted_other_answer_is_seen(toys: list[ToyTarget]) -> None:
    toys.append(ToyTarget(differs_after=25))
    _, faults = fuzzed(toys[0], 40)
    assert faults[0] == "after requests 20 to 29: another answer than at the start: (1, 2, 4) instead of (1, 2, 3)"


@pytest.mark.parametrize(
    ("case", "reply", "fault"),
    [
        (RequestCase("a", HELLO), Reply((1,)), ""),
        (RequestCase("a", HELLO), Reply(error=RequestError("no")), ""),
        (RequestCase("a", HELLO), Reply(error=ServerError("no")), "ServerError instead of a RequestError"),
        (RequestCase("a", HELLO, ours=False), Reply(error=ServerError("no")), ""),
        (RequestCase("a", HELLO, ours=False), Reply(error=ServerError("internal error (KeyError)")), "internal error"),
        (RequestCase("a", HELLO, ours=False), Reply(error=ServerError("x At:\n  model.py(3)")), "internal error"),
        (RequestCase("a", HELLO, expected=REFUSAL), Reply((1,)), "a request that is wrong was answered"),
        (RequestCase("a", HELLO, expected=ANSWER), Reply(error=RequestError("no")), "a valid request was refused"),
        (RequestCase("a", HELLO, expected=ANSWER), Reply(error=QueueFullError("full")), ""),
        (RequestCase("a", HELLO, expected=EITHER), Reply(broken="no answer in time"), "no answer in time"),
        (RequestCase("a", HELLO), Reply(error=RequestError("one\ntwo")), "not one short line"),
    ],
)
def test_replies_are_judged(case: RequestCase, reply: Reply, fault: str) -> None:
    found = judge(case, reply)
    assert (fault in found) if fault else found == ""


def test_a_number_is_the_same_request_in_every_run() -> None:
    cases = [request_case(1, number) for number in range(300)]
    assert [case.sent for case in cases] == [request_case(1, number).sent for number in range(300)]
    assert {case.transport for case in cases} == {"gRPC", "HTTP"}
    assert {case.expected for case in cases} == {ANSWER, EITHER, REFUSAL}
    assert len({case.made for case in cases}) > len(HTTP_KINDS) + 8


def test_bodies_and_events_are_read() -> None:
    assert read_body(b'{"token_ids": 5}', 200).tokens == (5,)
    assert read_body(b'{"token_ids": [5, 6]}', 200).tokens == (5, 6)
    assert isinstance(read_body(b'{"error": "invalid request: no"}', 400).error, RequestError)
    assert read_body(b"<html>", 200).broken
    assert not read_body(b"<html>", 404).answered
    assert read_events([b'data: {"token_ids": 5}', b'data: {"token_ids": [6]}'], 200).tokens == (5, 6)
    assert read_events([b"no event"], 200).broken
