"""`nvlm-trt gateway --engine` as a process: what it prints, and how signals end it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gateway_calls import CHAT, ENDLESS, Endpoint, wait_until

NAME = "nvlm-h-tiny"


@contextlib.contextmanager
def running(engine: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], Endpoint]]:
    command = [sys.executable, "-m", "nvlm_trt.cli", "gateway", "--engine", str(engine), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("OpenAI endpoint at http://127.0.0.1:"), line
            yield process, Endpoint(int(line.rpartition(":")[2].removesuffix("/v1\n")), NAME)
        finally:
            process.kill()


def read_until(connection: object, wanted: bytes) -> bytes:
    seen = b""
    while wanted not in seen:
        piece = connection.recv(1 << 16)  # type: ignore[attr-defined]
        assert piece, seen[-300:]
        seen += piece
    return seen


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_finishes_the_open_answers(engine: Callable[[str], Path], number: signal.Signals) -> None:
    with running(engine(NAME)) as (process, endpoint):
        assert endpoint.post(CHAT, endpoint.body()).status == 200
        with endpoint.begin(endpoint.body(max_tokens=500, ignore_eos=True, stream=True)) as connection:
            read_until(connection, b'"content":"')
            process.send_signal(number)
            assert b'"finish_reason":"length"' in read_until(connection, b"[DONE]")
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_a_second_signal_ends_it_at_once(engine: Callable[[str], Path]) -> None:
    with running(engine(NAME)) as (process, endpoint):
        with endpoint.begin(endpoint.body(**ENDLESS, n=8, stream=True)) as connection:
            read_until(connection, b'"content":"')
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: endpoint.call("GET", "/health/ready").status == 503, "the gateway drains")
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            rest = b""
            while piece := connection.recv(1 << 16):
                rest += piece
        assert b"[DONE]" not in rest


def test_a_signal_while_the_engine_is_loaded(engine: Callable[[str], Path]) -> None:
    command = [sys.executable, "-m", "nvlm_trt.cli", "gateway", "--engine", str(engine(NAME)), "--port", "0"]
    script = (
        "import os, signal, sys; from nvlm_trt.runtime.pipeline import Pipeline; from nvlm_trt import cli; "
        "open_ = Pipeline.open; "
        "Pipeline.open = lambda *a, **k: (os.kill(os.getpid(), signal.SIGTERM), open_(*a, **k))[1]; cli.main()"
    )
    command[1:3] = ["-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
