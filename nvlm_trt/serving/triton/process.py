"""A running tritonserver, its log, and the guard that ends it should this process be killed."""

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

_TAIL_BYTES = 64 << 10
_KILL_SECONDS = 10


class TritonProcess:
    """Owns `directory` (repository, log, ...) and shared memory that begins with `shm_prefix`: gone after `kill`."""

    def __init__(
        self, command: Sequence[str | Path], environment: Mapping[str, str], directory: Path, shm_prefix: str
    ) -> None:
        self._log = directory / "tritonserver.log"
        self._models: dict[int, str] = {}
        self._killing = threading.Lock()  # the watching thread and the owner may want it at once
        # a session of its own: a Ctrl-C in the terminal reaches the supervisor alone, which then drains
        with self._log.open("wb") as log:
            self._server = subprocess.Popen(
                command,
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
        """None while it runs; negative if a signal ended it."""
        return self._server.poll()

    def watch_models(self) -> list[str]:
        """Note the model processes that there are, once all are loaded. Returns the model instances, sorted."""
        self._models = model_processes(self._server.pid)
        return sorted(self._models.values())

    def dead_models(self) -> list[str]:
        """Of the noted model instances those whose process has ended."""
        return [name for pid, name in self._models.items() if not is_running(pid)]

    def terminate(self, timeout: float) -> None:
        """Ask the server to stop, then `kill`."""
        self._server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._server.wait(timeout)
        self.kill()

    def kill(self) -> None:
        """End every process at once and remove the files. Harmless if that has happened."""
        with self._killing:
            if self._guard.returncode is not None:
                return
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait(_KILL_SECONDS)
            self._guard.communicate(b"stopped", timeout=_KILL_SECONDS)

    def log_tail(self, lines: int) -> list[str]:
        """The last lines of the log that a person can use: no tables, no complaints about a GPU that is not there."""
        with contextlib.suppress(OSError), self._log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = log.read().decode(errors="replace")
            return [line for line in text.splitlines() if line.strip() and not _NOISE.search(line)][-lines:]
        return []

    def load_error(self) -> str | None:
        """What a model said that failed to load, without where in the code it said it."""
        for line in self.log_tail(1000):
            # failed to load 'nvlm' version 1: Internal: EngineError: what it said\\n\\nAt:\\n  model.py(24)...
            match = re.search(r"failed to load '(\w+)' version \d+: \w+: (?:\w+Error: )?(.*?)(?:\\n|\"?$)", line)
            if match:
                return f"model {match[1]}: {match[2]}"
        return None

    def taken_port(self) -> int | None:
        """The port that the server could not listen on, if that is why it ended."""
        for line in self.log_tail(20):
            match = re.search(r"Socket '.*:(\d+)' already in use", line)
            if match:
                return int(match[1])
        return None


_NOISE = re.compile(r"^[|+]|\] $|CUDA|Cuda|NVML|DCGM|inned memory")
