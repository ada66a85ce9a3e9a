"""Runs tritonserver with a log, and with a guard that ends it if this process is killed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from nvlm_trt.serving.triton.process_watch import is_running, model_processes
from nvlm_trt.serving.triton.stack_limit import large_stacks

_TAIL_BYTES = 64 << 10
_KILL_SECONDS = 10


class TritonProcess:
    """A running tritonserver, in the working directory `directory`.

    `kill` removes `directory` and the shared memory whose name begins with `shm_prefix`."""

    def __init__(
        self, command: Sequence[str | Path], environment: Mapping[str, str], directory: Path, shm_prefix: str
    ) -> None:
        self._log = directory / "tritonserver.log"
        self._models: dict[int, str] = {}
        self._killing = threading.Lock()  # the watching thread and the owner may kill at the same time
        # a session of its own: a Ctrl-C in the terminal reaches only the supervisor, which then drains
        with self._log.open("wb") as log, large_stacks():
            self._server = subprocess.Popen(
                command,
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._guard = subprocess.Popen(
            [sys.executable, "-m", "nvlm_trt.serving.triton.guard", str(self._server.pid), str(directory), shm_prefix],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    @property
    def exit_status(self) -> int | None:
        """None while the server runs; negative if a signal ended it."""
        return self._server.poll()

    def watch_models(self) -> list[str]:
        """Notes the model processes; call it once all models are loaded. Returns the model instances, sorted."""
        self._models = model_processes(self._server.pid)
        return sorted(self._models.values())

    def dead_models(self) -> list[str]:
        """Returns the noted model instances whose process has ended."""
        return [name for pid, name in self._models.items() if not is_running(pid)]

    def terminate(self, timeout: float) -> None:
        """Asks the server to stop, waits up to `timeout` seconds, then kills it."""
        self._server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._server.wait(timeout)
        self.kill()

    def kill(self) -> None:
        """Ends every process at once and removes the files. Does nothing if that has happened before."""
        with self._killing:
            if self._guard.returncode is not None:
                return
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait(_KILL_SECONDS)
            self._guard.communicate(b"stopped", timeout=_KILL_SECONDS)

    def log_tail(self, lines: int) -> list[str]:
        """Returns the last useful lines of the log: leaves out tables and complaints about a missing GPU."""
        with contextlib.suppress(OSError), self._log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = log.read().decode(errors="replace")
            return [line for line in text.splitlines() if line.strip() and not _NOISE.search(line)][-lines:]
        return []

    def load_error(self) -> str | None:
        """Returns the message of a model that failed to load, without the places in its code."""
        for line in self.log_tail(1000):
            # failed to load 'nvlm' version 1: Internal: EngineError: what it said\\n\\nAt:\\n  model.py(24)...
            match = re.search(r"failed to load '(\w+)' version \d+: \w+: (?:\w+Error: )?(.*?)(?:\\n|\"?$)", line)
            if match:
                return f"model {match[1]}: {match[2]}"
        return None

    def taken_port(self) -> int | None:
        """Returns the port that the server could not listen on, None if it ended for another reason."""
        for line in self.log_tail(20):
            match = re.search(r"Socket '.*:(\d+)' already in use", line)
            if match:
                return int(match[1])
        return None


_NOISE = re.compile(r"^[|+]|\] $|CUDA|Cuda|NVML|DCGM|inned memory")
