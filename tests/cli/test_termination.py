"""Tests that a command that is told to end, or killed, leaves nothing for good, and has the right exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nvlm_trt.backends.onnxruntime import cpu

COMMAND = [sys.executable, "-m", "nvlm_trt.cli", "build"]


def start_build(checkpoint: Path, output: Path) -> subprocess.Popen[bytes]:
    """Starts a build and waits until it has a temporary folder."""
    process = subprocess.Popen([*COMMAND, "--checkpoint", str(checkpoint), "--output", str(output)])
    deadline = time.monotonic() + 60
    while not list(output.parent.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=str)
def test_a_build_that_is_told_to_end_leaves_nothing(
    checkpoint: Callable[[str], Path], tmp_path: Path, number: signal.Signals, status: int
) -> None:
    process = start_build(checkpoint("nvlm-d-tiny"), tmp_path / "out")
    process.send_signal(number)
    assert process.wait(timeout=60) == status
    assert list(tmp_path.iterdir()) == []


def test_a_build_removes_what_a_killed_one_left(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    process = start_build(checkpoint("nvlm-d-tiny"), tmp_path / "out")
    process.kill()
    process.wait()
    assert list(tmp_path.iterdir()) != []
    command = [*COMMAND, "--checkpoint", str(checkpoint("nvlm-d-tiny")), "--output", str(tmp_path / "out")]
    subprocess.run(command, check=True, timeout=120)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# A library in C++ cannot be interrupted at a chosen moment of its import: this module ends as pybind11's do.
INTERRUPTED_MODULE = """
import os, signal, time
try:
    os.kill(os.getpid(), {number})
    time.sleep(60)
except BaseException as error:
    raise ImportError("initialization failed") from error
"""


@pytest.mark.skipif(not cpu.multiplies_bf16(), reason="OpenVINO is not imported on a CPU without bf16")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=str)
def test_a_signal_during_an_import_is_no_import_error(
    engine: Callable[[str], Path], tmp_path: Path, number: signal.Signals, status: int
) -> None:
    (tmp_path / "openvino.py").write_text(INTERRUPTED_MODULE.format(number=int(number)))
    command = [sys.executable, "-m", "nvlm_trt.cli", "ask", "Hello", "--engine", str(engine("nvlm-d-tiny"))]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (status, "")
    assert "error" not in done.stderr
