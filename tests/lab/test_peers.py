"""A peer answers from a process of its own, and a worker that ends is reported."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from lab.peers.client import Peer, PeerError

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


def test_a_peer_decodes() -> None:
    with Peer(Path(sys.executable), "toy_worker", ["good"]) as peer:
        assert peer.version == "toy 1.0"
        seconds, tokens = peer.decode(np.zeros((2, 3), np.int64), steps=4, banned=7)
        assert seconds == 0.5
        np.testing.assert_array_equal(tokens, np.full((2, 5), 7))


def test_a_worker_that_ends_is_an_error() -> None:
    with pytest.raises(PeerError, match="toy_worker ended"):
        Peer(Path(sys.executable), "toy_worker", ["bad"])
