"""Describes the processor that the machine offers to this process."""

from __future__ import annotations

import functools
import os
from pathlib import Path


def available_cores() -> int:
    """Count the cores that this process may use, by its CPU affinity and the CPU quota of its container."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or no quota ("max")
        return cores


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Return the instruction sets of the first core by their Linux names; none if Linux lists none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def available_memory() -> int:
    """Return the bytes of memory that this process may take: what is free on the machine or could be freed, within the
    limit of its container."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (available,) = (int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        counts = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        return min(available, max(0, limit - int(counts["anon"])))
    except (OSError, ValueError, KeyError):  # no cgroup v2, or no limit ("max")
        return available
