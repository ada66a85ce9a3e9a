"""Ends a server whose supervisor is gone: `python -m nvlm_trt.serving.triton.guard GROUP DIRECTORY SHM_PREFIX`.

A supervisor killed with SIGKILL cannot clean up, so the guard waits beside it. When the guard's standard input ends, it
kills the process group, unless the line "stopped" came before, and removes the server's files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


def main(group: int, directory: str, prefix: str) -> None:
    """Waits for the end of standard input, then ends the group and removes `directory` and the shared memory."""
    # leaves a Ctrl-C in the terminal to the supervisor, which ends this process by closing its input
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.stdin.read().strip() != "stopped":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    remove_files(Path(directory), prefix)


def remove_files(directory: Path, prefix: str) -> None:
    """Remove what a server that has ended leaves. Does nothing where somebody has removed it before."""
    shutil.rmtree(directory, ignore_errors=True)
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
