"""Gives a kind of chaos its folder, its engine and its servers, and sees that nothing is left of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.code_state import ROOT
from lab.reliability.load import Load, answer_tokens
from lab.reliability.promise import NotHere, require
from lab.reliability.served import Served, as_a_terminal_does, marked_environment
from lab.reliability.traces import Traces


class Place:
    """A context manager: without an error, all servers are stopped with SIGTERM and checked for what they leave."""

    def __init__(self, folder: Path, engine: Path, checkpoint: Path) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        self._engine = engine
        self._servers: list[Served] = []
        self._traces: list[Traces] = []
        self._loads: list[Load] = []

    @property
    def engine(self) -> Path:
        """Returns the engine that all kinds share: for reading only."""
        return self._engine

    def own_engine(self) -> Path:
        """Copies the engine, for kinds that change its files."""
        copy = self.folder / "engine"
        shutil.copytree(self._engine, copy)
        return copy

    def start(self, engine: Path | None = None, **options: Any) -> Served:
        """Starts a server and does not wait for it."""
        folder = self.folder / f"server-{len(self._servers)}"
        self._servers.append(Served(engine or self._engine, folder, **options))
        return self._servers[-1]

    def serve(self, engine: Path | None = None, **options: Any) -> Served:
        """Starts a server and waits until it is ready."""
        return self.start(engine, **options).wait_until_ready()

    def load(self, served: Served, count: int = 8, **options: Any) -> Load:
        """Starts `count` streams, each of which has received its first token when this returns."""
        self._loads.append(Load(served.address, count, **options))
        return self._loads[-1].wait_until_streaming()

    def build(self, output: Path, *arguments: str, **process: Any) -> subprocess.Popen[str]:
        """Starts `nvlm-trt build` into `output`. Its TMPDIR is checked as a server's is."""
        traces = Traces(self.folder / f"build-{len(self._traces)}")
        self._traces.append(traces)
        command = [sys.executable, "-m", "nvlm_trt.cli", "build", "--checkpoint", str(self.checkpoint)]
        wrapper = process.pop("wrapper", ())
        return subprocess.Popen(
            [*wrapper, *command, "--output", str(output), *arguments],
            env=marked_environment(traces, {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **{**process, "preexec_fn": as_a_terminal_does(process.get("preexec_fn"))},
        )

    def ask(self, served: Served, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
        """Runs `nvlm-trt ask`. Returns what it prints."""
        command = [sys.executable, "-m", "nvlm_trt.cli", "ask", "What is it?", "--url", served.address, *arguments]
        surroundings = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
        done = subprocess.run(command, env=surroundings, capture_output=True, timeout=120, check=False)
        require(done.returncode == 0, f"ask ended with status {done.returncode}: {done.stderr.decode()}")
        return done.stdout.decode()

    def check_left(self) -> None:
        """Stops the servers that still run, and raises BrokenPromise if anything is left behind."""
        for load in self._loads:
            load.close()
        for served in self._servers:
            if served.process.poll() is None:
                require(served.stop() == 0, f"SIGTERM ended serve with status {served.process.returncode}")
            served.require_nothing_left()
        for traces in self._traces:
            left = traces.left(10)
            require(not left, f"the build left behind: {', '.join(left)}")

    def close(self) -> None:
        for load in self._loads:
            load.close()
        for served in self._servers:
            served.close()
        for traces in self._traces:
            traces.close()
            traces.remove()
        with contextlib.suppress(OSError):
            shutil.rmtree(self.folder)


def require_answers(served: Served, what: str = "afterwards") -> None:
    """Checks that a server answers a text and an image."""
    for image in (False, True):
        require(len(answer_tokens(served.address, image=image)) > 0, f"no answer {what}")


def end_of(build: subprocess.Popen[str], seconds: float = 300) -> tuple[int, str]:
    """Waits for a build. Returns its exit status and the last line of stderr."""
    try:
        _, errors = build.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        build.kill()
        build.communicate()
        require(False, f"the build did not end within {seconds:.0f} s")
    require("Traceback" not in errors, "the build printed a traceback")
    return build.returncode, (errors.strip().splitlines() or [""])[-1]


def namespace(*steps: str) -> Sequence[str]:
    """Returns a wrapper that runs shell commands in file systems of its own, then the command.

    Raises NotHere if this user may not do so."""
    tried = (
        subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False) if shutil.which("unshare") else None
    )
    if tried is None or tried.returncode:
        raise NotHere("needs root and unshare, for file systems of its own")
    return ["unshare", "-m", "sh", "-ec", "\n".join([*steps, 'exec "$@"']), "sh"]
