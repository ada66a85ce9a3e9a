"""Tests the guard, which outlives a killed supervisor, with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from nvlm_trt.serving.triton import guard
from nvlm_trt.serving.triton.process_watch import is_running


@pytest.fixture
def group() -> Iterator[subprocess.Popen[bytes]]:
    """A process and its child in their own process group."""
    process = subprocess.Popen(
        ["sh", "-c", "sleep 600 & echo started; wait"], start_new_session=True, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def run_guard(group: int, directory: Path, prefix: str, said: bytes) -> None:
    command = [sys.executable, "-m", "nvlm_trt.serving.triton.guard", str(group), str(directory), prefix]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    process.communicate(said, timeout=20)
    assert process.returncode == 0


def test_the_end_of_its_input_ends_the_group_and_removes_its_files(
    group: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    directory = tmp_path / "server"
    (directory / "models").mkdir(parents=True)
    prefix = f"nvlm_trt_test_{os.getpid()}_"
    regions = [guard.SHARED_MEMORY / f"{prefix}{i}" for i in range(2)]
    for region in regions:
        region.touch()
    children = psutil.Process(group.pid).children()
    run_guard(group.pid, directory, prefix, b"")
    assert group.wait(timeout=20) == -signal.SIGKILL
    assert children
    assert not any(is_running(child.pid) for child in children)
    assert not directory.exists()
    assert not any(region.exists() for region in regions)


def test_a_server_that_has_stopped_is_only_cleaned_up(group: subprocess.Popen[bytes], tmp_path: Path) -> None:
    directory = tmp_path / "server"
    directory.mkdir()
    run_guard(group.pid, directory, f"nvlm_trt_test_{os.getpid()}_", b"stopped")
    assert group.poll() is None
    assert not directory.exists()
    os.killpg(group.pid, signal.SIGKILL)
