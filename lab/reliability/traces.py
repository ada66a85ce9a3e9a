"""Finds what one run leaves on a machine that others use too: its processes, files and shared memory."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
import time
from pathlib import Path

import psutil

MARK = "NVLM_TRT_RELIABILITY"  # a variable that every process of a run inherits
SHARED_MEMORY = Path("/dev/shm")
_PREFIX = re.compile(r"shm-region-prefix-name=(\w+)")
_DECODING = "nvlm_trt.image.decoding_worker"
_STUB = "triton_python_backend_stub"
_SCAN_SECONDS = 0.2
_POLL_SECONDS = 0.1


class Traces:
    """Marks the processes of a run. A thread notes the names of their shared memory while they live."""

    def __init__(self, folder: Path) -> None:
        """`folder` becomes the TMPDIR of the processes."""
        self.folder = folder
        self.mark = secrets.token_hex(8)
        self._prefixes: set[str] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._scan, name="traces", daemon=True)
        folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def environment(self) -> dict[str, str]:
        return {MARK: self.mark, "TMPDIR": str(self.folder)}

    def processes(self) -> list[psutil.Process]:
        """Returns the living processes that have the mark."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark and is_alive(process):
                    found.append(process)
        return found

    def roles(self) -> dict[str, int]:
        """Returns role -> pid of each part: serve, guard, tritonserver, image server and worker, model instances."""
        return {role: process.pid for process in self.processes() if (role := role_of(process))}

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def left(self, seconds: float) -> list[str]:
        """Waits up to `seconds` for everything to go. Returns a line for each thing that is still there."""
        deadline = time.monotonic() + seconds
        while (found := self._left()) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return found

    def remove(self) -> None:
        """Ends the processes that are left, and removes their shared memory."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for entry in self._shared_memory():
            entry.unlink(missing_ok=True)

    def _left(self) -> list[str]:
        processes = [f"process {role_of(process) or process.pid}" for process in self.processes()]
        files = [f"file {path.name} in TMPDIR" for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return processes + files + [f"shared memory {path.name}" for path in self._shared_memory()]

    def _shared_memory(self) -> list[Path]:
        return [path for prefix in sorted(self._prefixes) for path in SHARED_MEMORY.glob(f"{prefix}*")]

    def _scan(self) -> None:
        while not self._closing.wait(_SCAN_SECONDS):
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    self._prefixes.update(_PREFIX.findall(" ".join(process.cmdline())))


def role_of(process: psutil.Process) -> str | None:
    """Names the part that a process plays in a server; None for a process that has ended or plays none."""
    try:
        arguments = process.cmdline()
    except psutil.Error:
        return None
    if not arguments:
        return None
    if any(_DECODING in argument for argument in arguments[:3]):
        return "image worker" if _decodes(process.ppid()) else "image server"
    if arguments[0].endswith(_STUB):
        return arguments[-2] if len(arguments) > 2 else None
    for part, role in {"nvlm_trt.cli": "serve", "nvlm_trt.serving.triton.guard": "guard"}.items():
        if part in arguments:
            return role
    name = os.path.basename(arguments[0])
    return name if name == "tritonserver" else None


def _decodes(pid: int) -> bool:
    """Says whether a process runs the module that decodes images."""
    try:
        return any(_DECODING in argument for argument in psutil.Process(pid).cmdline()[:3])
    except psutil.Error:
        return False


def is_alive(process: psutil.Process) -> bool:
    return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
