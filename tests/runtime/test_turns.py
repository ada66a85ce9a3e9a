"""Tests whose prompt is read next. test_scheduler.py tests that answers stay the same in every order."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_backend import Receiver, ToyBackend, ask, byte_tokenizer, tokens_alone

from nvlm_trt.api import SamplingParams
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.scheduler import PATIENCE, Scheduler

CHUNK = 8


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return byte_tokenizer(directory)


class Server:
    """A scheduler over a toy; prompts are as long as their numbers of chunks say."""

    def __init__(self, tokenizer: Tokenizer, slots: int = 4) -> None:
        self.tokenizer = tokenizer
        self.backend = ToyBackend(tokenizer.image_token_id, slots, max_seq_len=512)
        self.scheduler = Scheduler(self.backend, tokenizer, 100, CHUNK)
        self.order: list[str] = []  # names, in the order of their first tokens
        self._asked = 0

    def submit(self, name: str, chunks: int, priority: int = 0, max_tokens: int = 1, n: int = 1) -> Receiver:
        self._asked += 1
        sampling = SamplingParams(max_tokens, ignore_eos=True, priority=priority, n=n)
        asked = ask(self.tokenizer.image_token_id, self._asked, chunks * CHUNK, 0, sampling)
        receiver = Receiver(n)
        request = asked.request(receiver)
        on_delta = request.on_delta

        def note(delta: object) -> None:
            if name not in self.order:
                self.order.append(name)
            on_delta(delta)  # type: ignore[arg-type]

        request.on_delta = note
        self.scheduler.enqueue(request)
        return receiver

    def run(self, steps: int = 10_000) -> None:
        while steps and self.scheduler.has_work:
            self.scheduler.step()
            steps -= 1


def test_the_shortest_prompt_is_read_first(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer)
    for name, chunks in {"six": 6, "two": 2, "one": 1, "four": 4, "another two": 2}.items():
        server.submit(name, chunks)
    server.run()
    assert server.order == ["one", "two", "another two", "four", "six"]


def test_a_short_prompt_goes_between_the_chunks_of_a_long_one(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer)
    server.submit("long", 6)
    server.run(steps=2)
    server.submit("short", 1)
    server.run(steps=1)
    assert server.order == ["short"]
    server.run(steps=4)
    assert server.order == ["short", "long"]


def test_the_rest_of_a_prompt_counts_and_not_its_whole(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer)
    server.submit("long", 6)
    server.run(steps=4)
    server.submit("three", 3)
    server.run()
    assert server.order == ["long", "three"]


def test_what_is_kept_of_a_prompt_does_not_count(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer)
    server.submit("long", 6)
    server.run()
    server._asked = 0  # the same prompt again
    server.submit("again", 6)
    server._asked = 5
    server.submit("three", 3)
    server.run()
    assert server.order == ["long", "again", "three"]


def test_long_prompts_leave_slots_to_short_ones(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer, slots=2)
    for index in range(3):
        server.submit(f"long {index}", 5)
    server.run(steps=2)
    assert server.scheduler.metrics().free_slots == 1
    server.submit("short", 1)
    server.run(steps=1)
    assert server.order == ["short"]
    server.run()
    assert server.order == ["short", "long 0", "long 1", "long 2"]


@pytest.mark.parametrize("chunks", [2, 5, 12])
def test_a_long_prompt_is_not_starved(tokenizer: Tokenizer, chunks: int) -> None:
    """A prompt of one chunk arrives at every step, as many as can be read."""
    server = Server(tokenizer)
    server.submit("long", chunks)
    for step in range(100):
        server.submit(f"short {step}", 1)
        server.run(steps=1)
    assert server.order.index("long") <= PATIENCE * chunks


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9)), min_size=2, max_size=12))
def test_every_prompt_waits_for_a_bounded_number_of_chunks(
    tokenizer: Tokenizer, prompts: list[tuple[int, int]]
) -> None:
    """No prompt waits for more chunks than those of the prompts before it, and of those that arrive while PATIENCE
    chunks are run for each of its own."""
    server = Server(tokenizer, slots=12)
    arrivals = sorted(((step, index, chunks) for index, (chunks, step) in enumerate(prompts)))
    arrived: dict[int, int] = {}
    for now in range(200):
        for step, index, chunks in arrivals:
            if step == now:
                arrived[index] = server.scheduler._chunks
                server.submit(str(index), chunks)
        server.run(steps=1)
    assert len(server.order) == len(prompts)
    for index, (chunks, _) in enumerate(prompts):
        ahead = server.order[: server.order.index(str(index))]
        assert all(arrived[int(other)] <= arrived[index] + PATIENCE * chunks for other in ahead)


def test_a_lower_priority_number_goes_first(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer)
    for name, (chunks, priority) in {
        "short": (1, 0),
        "urgent and long": (9, -5),
        "late": (1, 7),
        "urgent": (2, -5),
    }.items():
        server.submit(name, chunks, priority)
    server.run()
    assert server.order == ["urgent", "urgent and long", "short", "late"]


def test_an_urgent_prompt_interrupts_others(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer)
    server.submit("short", 2)
    server.run(steps=1)
    server.submit("urgent", 6, priority=-1)
    server.run()
    assert server.order == ["urgent", "short"]


def test_running_answers_wait_for_one_chunk_at_most(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer)
    server.submit("running", 1, max_tokens=60)
    server.run(steps=2)
    for index in range(3):
        server.submit(f"long {index}", 5)
    server.submit("short", 1)
    server.backend.calls.clear()
    server.run(steps=16)
    assert [kind for kind, _ in server.backend.calls] == ["prefill", "decode"] * 16


def test_several_answers_keep_their_turn(tokenizer: Tokenizer) -> None:
    """They wait until all their slots are free, and what arrives after their patience is behind them."""
    server = Server(tokenizer, slots=3)
    server.submit("running", 1, max_tokens=30)
    server.run(steps=1)
    several = server.submit("several", 1, n=3)
    for index in range(5):
        server.submit(f"short {index}", 1, max_tokens=2)
        server.run(steps=2)
    assert server.order == ["running"]
    server.run()
    assert server.order[:2] == ["running", "several"]
    assert several.ended


def test_prompts_that_are_read_in_turns_have_their_own_rows(tokenizer: Tokenizer) -> None:
    """Each is interrupted by the next, and the last is finished first: the rows change places."""
    server = Server(tokenizer, slots=5)
    sampling = SamplingParams(6, ignore_eos=True)
    asked = [ask(tokenizer.image_token_id, i, (5 - i) * 2 * CHUNK, 1, sampling, 100 + i) for i in range(5)]
    receivers = [Receiver() for _ in asked]
    for one, receiver in zip(asked, receivers, strict=True):
        server.scheduler.enqueue(one.request(receiver))
        server.run(steps=1)
    server.run()
    for one, receiver in zip(asked, receivers, strict=True):
        assert receiver.token_ids == tokens_alone(server.backend, tokenizer, one)
