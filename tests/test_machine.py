"""Cores and memory that a process may use."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil

from nvlm_trt.machine import available_memory


def test_cores_follow_the_cpu_affinity() -> None:
    one = min(os.sched_getaffinity(0))
    code = (
        "import os; from nvlm_trt.machine import available_cores; print(available_cores()); "
        f"os.sched_setaffinity(0, {{{one}}}); print(available_cores())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    everything, pinned = map(int, result.stdout.split())
    assert 1 <= everything <= len(os.sched_getaffinity(0))
    assert pinned == 1


def test_no_more_memory_than_is_free() -> None:
    assert 0 < available_memory() <= 1.1 * psutil.virtual_memory().available  # other processes come and go
