"""Runs `nvlm-trt serve` as a user does, in a process of its own whose traces can be found."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lab.code_state import ROOT
from lab.reliability.promise import BrokenPromise, require
from lab.reliability.traces import Traces

READY_SECONDS = 120.0
END_SECONDS = 90.0  # the drain's 30 s, Triton's own exit, and a busy machine
GONE_SECONDS = 30.0
_POLL_SECONDS = 0.05
_OWN_VARIABLES = ("ORT_DISABLE_TELEMETRY",)  # the product sets it: what it starts has to do so itself


class Served:
    """A process that runs `nvlm-trt serve`. A context manager: on exit the process and its traces are removed."""

    def __init__(
        self,
        engine: Path,
        folder: Path,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        wrapper: Sequence[str] = (),
        tmpdir: Path | None = None,
        **process: Any,
    ) -> None:
        """Starts the command. `wrapper` precedes it; `process` are further arguments of Popen."""
        folder.mkdir(parents=True, exist_ok=True)
        self.traces = Traces(tmpdir or folder / "tmp")
        self._out, self._err = folder / "serve.out", folder / "serve.err"
        self.address = self.http_address = self.metrics_address = ""
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [*wrapper, sys.executable, "-m", "nvlm_trt.cli", "serve", str(engine), *_ports(arguments), *arguments],
                env=marked_environment(self.traces, environment or {}),
                **{**_streams(out, err), **process, "preexec_fn": as_a_terminal_does(process.get("preexec_fn"))},
            )

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def errors(self) -> str:
        return self._err.read_text(encoding="utf-8", errors="replace")

    def wait_until_ready(self, seconds: float = READY_SECONDS) -> Served:
        """Waits for the line with the addresses. Raises BrokenPromise if the command ends before."""
        deadline = time.monotonic() + seconds
        while not self._read_addresses():
            status = self.process.poll()
            require(status is None, f"serve ended with status {status} before it was ready: {self.errors.strip()}")
            require(time.monotonic() < deadline, f"serve was not ready within {seconds:.0f} s")
            time.sleep(_POLL_SECONDS)
        return self

    def is_ready_or_ended(self, seconds: float = READY_SECONDS) -> bool:
        """Waits for one of the two. Returns whether the command is ready; raises BrokenPromise if it is neither."""
        with contextlib.suppress(BrokenPromise):
            self.wait_until_ready(seconds)
            return True
        require(self.process.poll() is not None, f"serve was neither ready nor ended after {seconds:.0f} s")
        return False

    def roles(self) -> dict[str, int]:
        return self.traces.roles()

    def pid_of(self, role: str) -> int:
        """Returns the process of a role, or of the first model instance whose name begins with it."""
        for name, pid in sorted(self.roles().items()):
            if name == role or name.startswith(f"{role}_0"):
                return pid
        raise BrokenPromise(f"there is no process {role}")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, seconds: float = END_SECONDS) -> int:
        """Waits for the end of the command. Returns its exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise BrokenPromise(f"serve did not end within {seconds:.0f} s") from None

    def stop(self, seconds: float = END_SECONDS) -> int:
        """Sends SIGTERM and waits."""
        self.signal(signal.SIGTERM)
        return self.end(seconds)

    def require_ended(self, status: int, seconds: float = END_SECONDS) -> str:
        """Checks the exit status, that at most one line begins with "error: ", and that none is a traceback.

        Returns the last line of stderr."""
        found = self.end(seconds)
        lines = self.errors.strip().splitlines()
        last = lines[-1] if lines else ""
        require(found == status, f"serve ended with status {found} instead of {status}: {last}")
        require("Traceback" not in self.errors, "serve printed a traceback")
        if status:
            require(last.startswith("error: "), f"the last line of serve is no error of one line: {last}")
            require("internal: " not in last, f"serve ended with an internal error: {last}")
        return last

    def require_nothing_left(self) -> None:
        left = self.traces.left(GONE_SECONDS)
        require(not left, f"left behind: {', '.join(left)}")

    def close(self) -> None:
        """Ends the command and whatever it left."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self.traces.close()
        self.traces.remove()

    def _read_addresses(self) -> bool:
        line = self._out.read_text(encoding="utf-8", errors="replace")
        found = re.search(r"serving at (grpc://\S+) \(HTTP ([^,]+), (http\S+)\)", line)
        if found:
            self.address, self.http_address, self.metrics_address = found.groups()
        return found is not None


def running(engine: Path, folder: Path, **options: Any) -> Served:
    """Starts a server and waits until it is ready; removes it if it is not."""
    served = Served(engine, folder, **options)
    try:
        return served.wait_until_ready()
    except BaseException:
        served.close()
        raise


def as_a_terminal_does(then: Callable[[], None] | None = None) -> Callable[[], None]:
    """Returns a function that lets a new process take the signals that a background job would ignore."""

    def restore() -> None:
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        if then:
            then()

    return restore


def limited(resource: int, value: int) -> Callable[[], None]:
    """Returns a function that lowers a limit of the process that is about to start."""

    def lower() -> None:
        import resource as limits

        limits.setrlimit(resource, (value, value))

    return lower


def _ports(arguments: Sequence[str]) -> list[str]:
    names = ("--grpc-port", "--http-port", "--metrics-port")
    return [word for name in names if name not in arguments for word in (name, "0")]


def marked_environment(traces: Traces, added: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a user, with the mark of a run. A variable added as "" is left out."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    base = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **traces.environment(), **added}
    return {name: value for name, value in base.items() if value and name not in _OWN_VARIABLES}


def _streams(out: IO[bytes], err: IO[bytes]) -> dict[str, Any]:
    return {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err, "start_new_session": True}
