"""A peer answers from a process of its own, and a worker that ends is reported."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import numpy as np
import pytest

from lab.peers.client import Peer, PeerError, Worker, open_workers
from lab.peers.worker import Clock

WORKER = """
import sys
from lab.peers.worker import serve

def load():
    print("this goes to stderr")
    assert sys.argv[1] == "good", sys.argv
    def decode(prompt, steps, banned):
        return {"seconds": 0.5, "tokens": [[banned] * (steps + 1) for _ in prompt]}
    return "toy 1.0", decode

serve(load)
"""


@pytest.fixture(autouse=True)
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def toy(argument: str, python: Path = Path(sys.executable)) -> Worker:
    return Worker(python, "toy_worker", [argument])


def test_a_peer_decodes() -> None:
    with Peer(toy("good")) as peer:
        assert peer.version == "toy 1.0"
        seconds, tokens = peer.decode(np.zeros((2, 3), np.int64), steps=4, banned=7)
        assert seconds == 0.5
        np.testing.assert_array_equal(tokens, np.full((2, 5), 7))


def test_a_worker_that_ends_is_an_error() -> None:
    with pytest.raises(PeerError, match="toy_worker ended"):
        Peer(toy("bad"))


def test_a_worker_that_ends_at_a_question_is_an_error() -> None:
    with Peer(toy("good")) as peer:
        for _ in range(2):
            with pytest.raises(PeerError, match="toy_worker ended"):
                peer.ask({"prompts": []})


def test_workers_that_do_not_start_are_notes(tmp_path: Path) -> None:
    workers = {"one": toy("good"), "two": toy("bad"), "three": toy("good", tmp_path / "python")}
    with contextlib.ExitStack() as opened:
        peers, notes = open_workers(workers, opened)
        assert list(peers) == ["one"]
    assert notes == [
        "two skipped: toy_worker ended; its last messages are above",
        f"three skipped: {tmp_path / 'python'} does not exist (--help says how to make it)",
    ]


def test_a_clock_times_every_token() -> None:
    clock = Clock()
    with pytest.raises(AssertionError, match="1 tokens, 0 ticks"):
        clock.answer([7], prompt_tokens=3, image_tokens=2)
    for _ in range(3):
        clock.tick()
    answer = clock.answer([7, 8, 9], prompt_tokens=3, image_tokens=2, prefill=0.5)
    assert 0 < answer["first_s"] < answer["total_s"]
    assert answer["parts"] == {"prefill": 0.5}
