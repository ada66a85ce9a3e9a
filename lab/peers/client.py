"""Asks peers, other software in an environment of its own, over pipes, in the format of lab/peers/worker.py."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lab.code_state import ROOT

PEERS = {"llama.cpp Q8_0": "lab.peers.llama_cpp_worker", "OpenVINO int8": "lab.peers.openvino_worker"}


class PeerError(Exception):
    """A worker does not start or ends early."""


class Peer:
    """A worker in the peers' environment. A context manager; raises PeerError if the worker does not start."""

    def __init__(self, python: Path, worker: str, arguments: Sequence[object]) -> None:
        self._worker = worker
        command = [str(python), "-m", worker, *map(str, arguments)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        try:
            self.version: str = self._read()["ready"]
        except PeerError:
            self.__exit__()
            raise

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def decode(self, prompt: np.ndarray, steps: int, banned: int) -> tuple[float, np.ndarray]:
        """prompt [batch, tokens] -> seconds of the steps, tokens [batch, 1 + steps]; `banned` is never chosen."""
        answer = self.ask(prompt, steps, banned)
        return answer["seconds"], np.array(answer["tokens"])

    def ask(self, prompt: np.ndarray, steps: int, banned: int) -> dict[str, Any]:
        """Returns the worker's whole answer. Raises PeerError if the worker has ended."""
        assert self._process.stdin is not None
        asked = {"prompt": prompt.tolist(), "steps": steps, "banned": banned}
        self._process.stdin.write(json.dumps(asked, allow_nan=False) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"{self._worker} ended; its last messages are above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def open_peers(
    arguments: argparse.Namespace,
    checkpoint: Path,
    opened: contextlib.ExitStack,
    only: Sequence[str] = tuple(PEERS),
    options: Sequence[str] = (),
) -> tuple[dict[str, Peer], list[str]]:
    """Returns the peers that start, and a line on each that does not. Workers get `options` at the end."""
    python = (arguments.peers or arguments.work / "peers" / "bin" / "python").absolute()
    exported = arguments.work / "hf" / arguments.preset
    converted = {name: arguments.work / "hf" / f"{arguments.preset} {name}" for name in PEERS}
    peers: dict[str, Peer] = {}
    notes = []
    for name in only:
        if not python.exists():
            notes.append(f"{name} skipped: {python} does not exist (--help says how to make it)")
        else:
            if not exported.exists():
                from lab.transformers_model import language_model

                language_model(checkpoint).save_pretrained(exported, max_shard_size="100GB")
            try:
                worker = Peer(python, PEERS[name], [exported, converted[name], arguments.threads, *options])
                peers[name] = opened.enter_context(worker)
            except PeerError as error:
                notes.append(f"{name} skipped: {error}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return peers, notes
