"""Runs tritonserver with a log and limits, and with a guard that ends it if this process is killed."""

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

from nvlm_trt.serving.triton.drain_channel import DrainChannel
from nvlm_trt.serving.triton.process_limits import limit_process
from nvlm_trt.serving.triton.process_watch import dead_children, is_running, model_processes
from nvlm_trt.serving.triton.server_folder import ServerFolder
from nvlm_trt.serving.triton.server_log import ServerLog
from nvlm_trt.serving.triton.stack_limit import large_stacks

_KILL_SECONDS = 10


class TritonProcess:
    """A running tritonserver in the working directory `folder`, which inherits the model's end of `channel`. `kill`
    removes `folder`, which is not needed to end the server."""

    def __init__(
        self,
        command: Sequence[str | Path],
        environment: Mapping[str, str],
        folder: ServerFolder,
        channel: DrainChannel,
        region_bytes: int,
    ) -> None:
        self._folder = folder
        self._models: dict[int, str] = {}
        self._killing = threading.Lock()  # the watching thread and the owner may kill at the same time
        self._killed = False
        self.log = ServerLog(folder.path / "tritonserver.log")
        try:
            # a session of its own: a Ctrl-C in the terminal reaches only the supervisor, which then drains. Signals are
            # not restored, so SIGXFSZ stays ignored, as Python has it: writing too much is an error that is answered.
            with large_stacks():
                self._server = subprocess.Popen(
                    command,
                    cwd=folder.path,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=self.log.write_end,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    restore_signals=False,
                    pass_fds=(channel.descriptor,),
                )
        finally:
            self.log.close_write_end()
            channel.close_inherited()
        try:
            with contextlib.suppress(ProcessLookupError):
                limit_process(self._server.pid, region_bytes)
            self._guard = self._start_guard()
        except BaseException:
            self._kill_server()
            raise

    @property
    def shm_prefix(self) -> str:
        """Begins the names of the server's shared memory."""
        return self._folder.shm_prefix

    @property
    def exit_status(self) -> int | None:
        """None while the server runs; negative if a signal ended it."""
        return self._server.poll()

    def watch_models(self) -> list[str]:
        """Notes the model processes; call it once all models are loaded. Returns the model instances, sorted."""
        self._models = model_processes(self._server.pid)
        return sorted(self._models.values())

    def dead_children(self) -> set[int]:
        """Returns the ids of the model processes that have ended, noted or not."""
        return dead_children(self._server.pid)

    def dead_models(self) -> list[str]:
        """Returns the noted model instances whose process has ended."""
        return [name for pid, name in self._models.items() if not is_running(pid)]

    def keep_guarded(self) -> None:
        """Starts another guard if somebody has killed it."""
        with self._killing:
            if not self._killed and self._guard.poll() is not None:
                self._guard = self._start_guard()

    def terminate(self) -> None:
        """Asks the server to stop."""
        self._server.terminate()

    def wait(self, timeout: float) -> None:
        """Waits up to `timeout` seconds for the server's end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._server.wait(timeout)

    def kill(self) -> None:
        """Ends every process at once and removes the files. Does nothing if that has happened before."""
        with self._killing:
            if self._killed:
                return
            self._killed = True
            self._kill_server()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._guard.communicate(b"stopped", timeout=_KILL_SECONDS)
            self._folder.remove()  # also if somebody has killed the guard
            self.log.settle()

    def load_error(self) -> str | None:
        """Returns the message of a model that failed to load, without the places in its code."""
        for line in self.log.tail(1000):
            # failed to load 'nvlm' version 1: Internal: EngineError: what it said\\n\\nAt:\\n  model.py(24)...
            match = re.search(r"failed to load '(\w+)' version \d+: \w+: (?:\w+Error: )?(.*?)(?:\\n|\"?$)", line)
            if match:
                return f"model {match[1]}: {match[2]}"
        return None

    def taken_port(self) -> int | None:
        """Returns the port that the server could not listen on, None if it ended for another reason."""
        for line in self.log.tail(20):
            match = re.search(r"Socket '.*:(\d+)' already in use", line)
            if match:
                return int(match[1])
        return None

    def _kill_server(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait(_KILL_SECONDS)

    def _start_guard(self) -> subprocess.Popen[bytes]:
        arguments = [str(self._server.pid), str(self._folder.path), self._folder.shm_prefix]
        return subprocess.Popen(
            [sys.executable, "-m", "nvlm_trt.serving.triton.guard", *arguments],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
