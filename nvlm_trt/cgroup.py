"""Reads the limits that containers and services set for this process: those of its control groups, version 1 or 2."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

MEMORY_LIMITS = ("memory.max", "memory.limit_in_bytes")  # of versions 2 and 1
_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def cpu_limit() -> float:
    """Return the number of cores whose time this process may use; infinity without a limit."""
    return min((_cores(group) for group in groups("cpu")), default=math.inf)


def memory_limit() -> float:
    """Return the bytes of memory that this process may still take; infinity without a limit.

    Pages of files count as free: the kernel drops them when the group reaches its limit."""
    return min((_free_memory(group) for group in groups("memory")), default=math.inf)


def held_memory(group: Path) -> int:
    """Return the bytes that a group has in memory and that belong to no file."""
    counts = dict(line.split() for line in _text(group / "memory.stat").splitlines())
    return int(counts.get("anon", counts.get("total_rss", 0)))  # of versions 2 and 1


def groups(controller: str) -> Iterator[Path]:
    """Yield the folders of the group of this process and of all groups around it."""
    for line in _text(_OWN).splitlines():
        _, names, path = line.split(":", 2)  # version 2 names no controllers
        if names and controller not in names.split(","):
            continue
        root = _ROOT / controller if names else _ROOT
        # a container may read the path that its group has on the host, and sees its own group as the root
        group = root / path.lstrip("/")
        yield from (each for each in (group, *group.parents) if each.is_relative_to(root) and each.is_dir())


def _cores(group: Path) -> float:
    quota, _, period = _text(group / "cpu.max").partition(" ")
    if not quota:
        quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
    is_limited = 0 < _number(quota) < math.inf  # version 1 writes -1 for no limit
    return float(quota) / float(period) if is_limited else math.inf


def _free_memory(group: Path) -> float:
    limit = min(_number(_text(group / name)) for name in MEMORY_LIMITS)
    return limit if limit == math.inf else max(0, limit - held_memory(group))


def _number(text: str) -> float:
    """Read a number; a file that does not exist, or that says "max", sets no limit."""
    return float(text) if text.lstrip("-").isdigit() else math.inf


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
