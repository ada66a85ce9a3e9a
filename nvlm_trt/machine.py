"""Describes the processor that the machine offers to this process."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from nvlm_trt.cgroup import cpu_limit, memory_limit


def available_cores() -> int:
    """Count the cores that this process may use, by its CPU affinity and the CPU quota of its container."""
    return max(1, round(min(len(os.sched_getaffinity(0)), cpu_limit())))


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
    return int(min(available, memory_limit()))
