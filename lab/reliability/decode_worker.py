"""Decodes and tiles files in a process of its own, which a watchdog ends when it takes too long."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from lab.reliability.file_cases import FileCase, file_case
from lab.reliability.memory import resident_mebibytes
from lab.reliability.valid_files import valid_files
from nvlm_trt.errors import ImageError
from nvlm_trt.image.decoding import load_image
from nvlm_trt.image.tiling import tile_image

DECODER = "lab.reliability.decode_worker:decode_and_tile"
TILE_SIZE, MAX_TILES = 112, 6
DECODED, REFUSED, FAULT = "decoded", "refused", "fault"
_LONGEST_MESSAGE = 500
_START_SECONDS = 120

Decoder = Callable[[bytes], Any]


@dataclass(frozen=True)
class FileOutcome:
    """Says what became of a file."""

    verdict: str
    detail: str = ""
    seconds: float = 0.0
    resident: float = 0.0  # MiB after the file
    peak: float = 0.0  # MiB, the highest of the process until now


def decode_and_tile(data: bytes) -> Any:
    """Does what the product does with the bytes of an image."""
    return tile_image(load_image(data), TILE_SIZE, MAX_TILES)


def judge(decoder: Decoder, case: FileCase) -> FileOutcome:
    """Decodes one file: it gives whole tiles, or an ImageError of one line. Anything else is a fault."""
    started = time.perf_counter()
    try:
        tiles = decoder(case.data)
        verdict, detail = DECODED, _wrong_tiles(tiles)
    except ImageError as error:
        verdict, detail = REFUSED, _wrong_message(str(error))
        if not detail and case.read:
            detail = f"a valid file is refused: {error}"
    except Exception as error:
        verdict, detail = FAULT, f"{type(error).__name__} instead of an ImageError: {' '.join(str(error).split())}"
    return FileOutcome(FAULT if detail else verdict, detail, time.perf_counter() - started)


def _wrong_tiles(tiles: Any) -> str:
    if tiles.ndim != 4 or tiles.shape[1:] != (3, TILE_SIZE, TILE_SIZE) or not 1 <= len(tiles) <= MAX_TILES + 1:
        return f"tiles of shape {tiles.shape}"
    return "" if np.isfinite(tiles).all() else "tiles that are not finite"


def _wrong_message(message: str) -> str:
    if "\n" in message or len(message) > _LONGEST_MESSAGE or not message.isprintable():
        return f"the message of an ImageError is not one short, printable line: {message[:200]!r}"
    return ""


def load(name: str) -> Decoder:
    """Imports MODULE:FUNCTION."""
    module, _, function = name.partition(":")
    decoder: Decoder = getattr(importlib.import_module(module), function)
    return decoder


def work(connection: Connection, seed: int, decoder: str) -> None:
    """Answers each number with the outcome of its file, until None comes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff complains there of every damaged file
    function = load(decoder)
    valid_files()  # made now, not within the time of the first file
    connection.send(None)
    while (number := connection.recv()) is not None:
        outcome = judge(function, file_case(seed, number))
        resident = resident_mebibytes(os.getpid()) or 0.0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        connection.send(FileOutcome(outcome.verdict, outcome.detail, outcome.seconds, resident, peak))


class DecodeWorker:
    """Owns one process, and starts another after a crash or a hang."""

    def __init__(self, seed: int, decoder: str, budget: float) -> None:
        """`budget`: seconds that a file may take."""
        self._seed, self._decoder, self._budget = seed, decoder, budget
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    @property
    def pid(self) -> int:
        return (self._process.pid or 0) if self._process else 0

    def run(self, number: int) -> FileOutcome:
        """Decodes the file of a number. A crash and a hang are faults."""
        connection = self._started()
        try:
            connection.send(number)
            if connection.poll(self._budget):
                outcome: FileOutcome = connection.recv()
                return outcome
            detail = f"no answer within {self._budget:.0f} s"
        except (EOFError, OSError):
            assert self._process is not None
            self._process.join(10)
            detail = f"the process died with status {self._process.exitcode}"
        self.close()
        return FileOutcome(FAULT, detail, self._budget)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None and self._connection is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
        self._process = self._connection = None

    def _started(self) -> Connection:
        if self._connection is not None:
            return self._connection
        context = multiprocessing.get_context("forkserver")  # another process after a crash starts at once
        context.set_forkserver_preload([__name__])
        ours, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, self._seed, self._decoder), daemon=True)
        self._process.start()
        theirs.close()
        self._connection = ours
        if not ours.poll(_START_SECONDS):
            raise TimeoutError(f"a decode worker did not start within {_START_SECONDS} s")
        ours.recv()
        return ours
