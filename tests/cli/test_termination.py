"""Tests that a command that is told to end, or killed, leaves no temporary folder for good."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

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
