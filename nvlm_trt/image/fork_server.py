"""Starts the process that forks decoding workers, one for this process and only when an image is to be decoded."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading

from nvlm_trt.errors import EngineError

_CODE = "import sys; fd = sys.argv[1]; sys.path[:] = sys.argv[2:]; from nvlm_trt.image.decoding_worker import main"
_ENVIRONMENT = {
    # numpy starts a thread per core otherwise, and a process with threads must not fork
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # glibc returns an image's memory to the system otherwise: touching it anew takes the next image half as long again
    "MALLOC_MMAP_THRESHOLD_": str(16 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}


class ForkServer:
    """Owns a server process, which ends when this process ends, however that happens. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server unless it runs. Does not wait until it is ready."""
        with self._lock:
            self._start()

    def fork(self, worker: socket.socket, mailbox: int) -> None:
        """Ask for a worker with this end of its socket and this mailbox. Starts a server that has died once more."""
        with self._lock:
            for attempt in range(2):
                control = self._start()
                try:
                    socket.send_fds(control, [b"w"], [worker.fileno(), mailbox])
                    return
                except OSError as error:
                    self._stop()
                    if attempt:
                        raise EngineError(f"the process that decodes images has ended ({error}); try again") from None

    def stop(self) -> None:
        with self._lock:
            self._stop()

    def _start(self) -> socket.socket:
        if self._control is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                # the path of imports is this process's: neither the folder it runs in nor -m adds to it
                command = [
                    sys.executable or "python3",
                    "-c",
                    f"{_CODE}\nmain(int(fd))",
                    str(theirs.fileno()),
                    *sys.path,
                ]
                self._process = subprocess.Popen(
                    command,
                    env={**os.environ, **_ENVIRONMENT},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
            self._control = ours
        return self._control

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        self._control = self._process = None

    def _forget(self) -> None:
        """Leave the server to the process that this one was forked from."""
        self.__init__()  # type: ignore[misc]


FORK_SERVER = ForkServer()
os.register_at_fork(after_in_child=FORK_SERVER._forget)
