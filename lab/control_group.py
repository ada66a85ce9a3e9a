"""Runs processes in a control group whose memory is limited, pages of files included. Needs root."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from lab.code_state import ROOT
from nvlm_trt.cgroup import MEMORY_LIMITS, groups, held_memory
from nvlm_trt.errors import EngineError

_LOOK_S = 0.02
_ENTER = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); os.execv(sys.argv[2], sys.argv[2:])"


@contextlib.contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """Makes a group within that of this process, for as long as the context lasts. Raises EngineError if it cannot."""
    for parent in groups("memory"):
        group = parent / f"nvlm-trt-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            files = [group / name for name in MEMORY_LIMITS if (group / name).exists()]
            for file in files:
                file.write_text(str(limit))
            if files:
                break
            group.rmdir()
    else:
        raise EngineError("no control group with a limit of memory can be made here; run as root")
    try:
        yield group
    finally:
        group.rmdir()


def run_in(group: Path, command: Sequence[str]) -> int:
    """Runs a command in the group. Returns the most bytes that the group had in memory which belong to no file, by a
    look every 20 ms. Raises EngineError if the command fails."""
    entered = [sys.executable, "-c", _ENTER, str(group / "cgroup.procs"), *command]
    with _Watch(group) as watch:
        status = subprocess.run(entered, cwd=ROOT, check=False).returncode
    if status:
        raise EngineError(f"{' '.join(command)} ended with status {status}")
    return watch.most


class _Watch(threading.Thread):
    def __init__(self, group: Path) -> None:
        super().__init__()
        self.most = 0
        self._group = group
        self._ended = threading.Event()

    def __enter__(self) -> _Watch:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        while not self._ended.wait(_LOOK_S):
            self.most = max(self.most, held_memory(self._group))
