from __future__ import annotations

import os
import subprocess

from nvlm_trt.serving.triton.process_watch import is_running, model_processes


def test_a_killed_process_does_not_run_even_as_a_zombie() -> None:
    process = subprocess.Popen(["sleep", "600"])
    assert is_running(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended and is a zombie now
    assert not is_running(process.pid)
    process.wait()
    assert not is_running(process.pid)


def test_only_stub_processes_are_models() -> None:
    process = subprocess.Popen(["sleep", "600"])
    try:
        assert model_processes(os.getpid()) == {}
    finally:
        process.kill()
        process.wait()
