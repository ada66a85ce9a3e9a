from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvlm_trt.errors import ServerError
from nvlm_trt.serving.triton import process_limits
from nvlm_trt.serving.triton.process_limits import check_descriptors, limit_process

EXTEND = """
import os, sys
input()
with open(sys.argv[1], "wb") as file:
    os.ftruncate(file.fileno(), 1 << 20)
    try:
        os.ftruncate(file.fileno(), (1 << 20) + 1)
    except OSError as error:
        print(os.strerror(error.errno))
"""


@pytest.fixture
def low_limit() -> Iterator[int]:
    """The usual soft limit of open files; returns the hard one."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, before[1]), before[1]))
    yield before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_process_may_open_as_many_files_as_the_hard_limit_allows(low_limit: int) -> None:
    process = subprocess.Popen(["sleep", "600"])
    try:
        limit_process(process.pid, 1 << 20)
        assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (low_limit, low_limit)
    finally:
        process.kill()
        process.wait()


def test_shared_memory_that_would_grow_too_large_is_an_error() -> None:
    region = Path(f"/dev/shm/nvlm_trt_test_{os.getpid()}")
    process = subprocess.Popen(
        [sys.executable, "-c", EXTEND, str(region)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        limit_process(process.pid, 1 << 20)
        assert process.communicate("\n", timeout=60)[0] == "File too large\n"
        assert process.returncode == 0
    finally:
        region.unlink(missing_ok=True)


def test_too_few_descriptors_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    check_descriptors()
    monkeypatch.setattr(process_limits, "most_descriptors", lambda: 64)
    with pytest.raises(ServerError, match="may have 64 files and connections open, too few; raise the limit to 1024"):
        check_descriptors()
