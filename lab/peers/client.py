"""Asks peers, programs in processes of their own, over pipes, in the format of lab/peers/worker.py."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lab.code_state import ROOT

PEERS = {"llama.cpp Q8_0": "lab.peers.llama_cpp_worker", "OpenVINO int8": "lab.peers.openvino_worker"}


class PeerError(Exception):
    """A worker does not start or ends early."""


@dataclass(frozen=True)
class Worker:
    """How to start a worker: PYTHON -m MODULE ARGUMENTS."""

    python: Path
    module: str
    arguments: Sequence[object]


class Peer:
    """A worker that runs. A context manager; raises PeerError if the worker does not start."""

    def __init__(self, worker: Worker) -> None:
        self._module = worker.module
        command = [str(worker.python), "-m", worker.module, *map(str, worker.arguments)]
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
        answer = self.ask({"prompt": prompt.tolist(), "steps": steps, "banned": banned})
        return answer["seconds"], np.array(answer["tokens"])

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the worker's whole answer. Raises PeerError if the worker has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question, allow_nan=False) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> PeerError:
        return PeerError(f"{self._module} ended; its last messages are above")


def open_workers(workers: Mapping[str, Worker], opened: contextlib.ExitStack) -> tuple[dict[str, Peer], list[str]]:
    """Returns the peers that start, and a line on each that does not."""
    peers: dict[str, Peer] = {}
    notes = []
    for name, worker in workers.items():
        if not worker.python.exists():
            notes.append(f"{name} skipped: {worker.python} does not exist (--help says how to make it)")
            continue
        try:
            peers[name] = opened.enter_context(Peer(worker))
        except PeerError as error:
            notes.append(f"{name} skipped: {error}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return peers, notes


def peers_python(arguments: argparse.Namespace) -> Path:
    """Returns the Python of the peers' environment: --peers, or the one below --work."""
    python: Path = arguments.peers or arguments.work / "peers" / "bin" / "python"
    return python.absolute()


def exported_language_model(work: Path, checkpoint: Path) -> Path:
    """Writes the checkpoint's language model as transformers saves it, float32, unless it is there."""
    exported = work / "hf" / checkpoint.name
    if not exported.exists():
        from lab.transformers_model import language_model

        language_model(checkpoint).save_pretrained(exported, max_shard_size="100GB")
    return exported


def open_peers(
    arguments: argparse.Namespace,
    checkpoint: Path,
    opened: contextlib.ExitStack,
    only: Sequence[str] = tuple(PEERS),
    options: Sequence[str] = (),
) -> tuple[dict[str, Peer], list[str]]:
    """Opens the peers that decode, as `open_workers` does. Workers get `options` at the end."""
    python = peers_python(arguments)
    exported = exported_language_model(arguments.work, checkpoint) if python.exists() else checkpoint
    converted = {name: arguments.work / "hf" / f"{checkpoint.name} {name}" for name in only}
    workers = {
        name: Worker(python, PEERS[name], [exported, converted[name], arguments.threads, *options]) for name in only
    }
    return open_workers(workers, opened)
