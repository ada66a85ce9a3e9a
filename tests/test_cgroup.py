"""Limits of control groups, in trees of files as the kernel shows them, and in a real group."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from lab.control_group import control_group
from nvlm_trt import cgroup, machine
from nvlm_trt.errors import EngineError

V1_NO_LIMIT = "9223372036854771712"


def lay_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: Mapping[str, str], folders: tuple[str, ...] = ()
) -> None:
    """Write what the kernel shows: `own` is /proc/self/cgroup, `files` are below /sys/fs/cgroup."""
    root = tmp_path / "groups"
    for folder in folders:
        (root / folder).mkdir(parents=True)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(cgroup, "_ROOT", root)
    monkeypatch.setattr(cgroup, "_OWN", tmp_path / "own")


def test_version_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service within a slice: each may set a limit, and the narrowest holds."""
    files = {
        "memory.stat": "anon 5\nfile 7\n",
        "a/memory.max": "1000\n",
        "a/memory.stat": "anon 300\nfile 600\n",
        "a/cpu.max": "150000 100000\n",
        "a/b/memory.max": "max\n",
        "a/b/memory.stat": "anon 100\nfile 600\n",
        "a/b/cpu.max": "max 100000\n",
        "other/memory.max": "1\n",
    }
    lay_out(tmp_path, monkeypatch, "0::/a/b\n", files)
    assert (cgroup.memory_limit(), cgroup.cpu_limit()) == (700, 1.5)
    assert (machine.available_memory(), machine.available_cores()) == (700, min(2, len(os.sched_getaffinity(0))))


def test_version_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "memory/memory.limit_in_bytes": V1_NO_LIMIT,
        "memory/memory.stat": "total_rss 5\n",
        "memory/a/memory.limit_in_bytes": "1000\n",
        "memory/a/memory.stat": "rss 1\ntotal_rss 300\n",
        "cpu/cpu.cfs_quota_us": "-1\n",
        "cpu/cpu.cfs_period_us": "100000\n",
        "cpu/b/cpu.cfs_quota_us": "50000\n",
        "cpu/b/cpu.cfs_period_us": "100000\n",
    }
    lay_out(tmp_path, monkeypatch, "5:cpuacct,cpu:/b\n4:memory:/a\n3:pids:/\n0::/\n", files)
    assert (cgroup.memory_limit(), cgroup.cpu_limit()) == (700, 0.5)
    assert machine.available_cores() == 1


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_that_reads_the_path_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    own, root, limit, used = (
        ("4:memory:/docker/1f\n", "memory/", "memory.limit_in_bytes", "total_rss")
        if version == 1
        else ("0::/docker/1f\n", "", "memory.max", "anon")
    )
    lay_out(tmp_path, monkeypatch, own, {f"{root}{limit}": "1000\n", f"{root}memory.stat": f"{used} 300\n"})
    assert cgroup.memory_limit() == 700


@pytest.mark.parametrize("own", ["", "0::/\n", "0::/gone\n", "4:memory:/\n0::/\n", "1:name=systemd:/\n"])
def test_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str) -> None:
    lay_out(tmp_path, monkeypatch, own, {}, ("memory",))
    assert (cgroup.memory_limit(), cgroup.cpu_limit()) == (math.inf, math.inf)
    assert machine.available_memory() > 1 << 20
    assert machine.available_cores() == len(os.sched_getaffinity(0))


def test_a_group_that_uses_all_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(tmp_path, monkeypatch, "0::/\n", {"memory.max": "1000\n", "memory.stat": "anon 1200\n"})
    assert machine.available_memory() == 0


def test_a_real_group() -> None:
    limit = 512 << 20
    code = (
        "import os, sys; from pathlib import Path; Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid())); "
        "from nvlm_trt.machine import available_memory; taken = bytearray(100 << 20); print(available_memory())"
    )
    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(control_group(limit))
        except EngineError as error:
            pytest.skip(str(error))
        printed = subprocess.run([sys.executable, "-c", code, str(group)], capture_output=True, text=True, check=True)
    assert limit - (200 << 20) < int(printed.stdout) < limit - (95 << 20)
