"""Decodes images in processes that can be ended: a server process forks one worker after another.

The server has imported all that decoding needs, so that a worker that was ended is replaced within milliseconds. It
imports neither torch nor an engine's runtime, and has one thread. `nvlm_trt.image.fork_server` starts it.

A worker and its owner share a socket, which carries one JSON message per job and per reply, and a file in memory (the
mailbox), which holds the encoded image and then the pixels. The worker ends when its owner closes the socket or is
killed: at once, in the middle of a decoder's loop too, by SIGIO.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import io
import json
import os
import resource
import select
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from nvlm_trt.errors import ImageError, RequestError
from nvlm_trt.image.decoding import FORMATS, ImageLimits, load_image
from nvlm_trt.image.tiling import cut_tiles

MESSAGE_BYTES = 16 << 10
_LONGEST_ERROR = 2000


def main(control_fd: int) -> None:
    """Fork a worker for each (socket, mailbox) that the control socket brings, until it is closed.

    Tells the owner of a worker that has ended its status, {"status": -6} for SIGABRT, by the worker's socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in the terminal is the owner's business
    _import_decoders()
    control = socket.socket(fileno=control_fd)
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    workers: dict[int, socket.socket] = {}
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(woken, select.POLLIN)
    while True:
        ready = [fd for fd, _ in poll.poll()]
        if woken.fileno() in ready:
            woken.recv(1 << 10)
            _report_ended(workers)
        if control.fileno() in ready:
            message, fds, _, _ = socket.recv_fds(control, 1, 2)
            if not message:
                break
            worker, mailbox = socket.socket(fileno=fds[0]), fds[1]
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for inherited in (control, woken, wake, *workers.values()):
                    inherited.close()
                _run_worker(worker, mailbox)
            os.close(mailbox)
            workers[pid] = worker
    for pid in workers:  # they end, too, if the owner has
        os.waitpid(pid, 0)


def _import_decoders() -> None:
    """Import and use all that decoding needs once, so that no worker has to."""
    for image_format in FORMATS:
        encoded = io.BytesIO()
        Image.new("RGB", (8, 8)).save(encoded, image_format)
        cut_tiles(load_image(encoded.getvalue()), 8, 1)
    gc.freeze()  # the collector writes into objects, and the kernel would copy their pages for each worker


def _report_ended(workers: dict[int, socket.socket]) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = ended
            with workers.pop(pid) as worker, contextlib.suppress(OSError):  # the owner may be gone
                worker.send(json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode())


# --- a worker --------------------------------------------------------------------------------------------------------


def _run_worker(connection: socket.socket, mailbox: int) -> None:
    """Work until the owner closes the connection. Does not return."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff and aborts print; the owner tells errors in one line
        fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(connection, fcntl.F_SETFL, fcntl.fcntl(connection, fcntl.F_GETFL) | os.O_ASYNC)
        connection.send(json.dumps({"pid": os.getpid()}).encode())
        while message := connection.recv(MESSAGE_BYTES):
            connection.send(json.dumps(_reply(json.loads(message), mailbox, connection)).encode())
    finally:
        os._exit(0)


def _reply(job: dict[str, Any], mailbox: int, connection: socket.socket) -> dict[str, Any]:
    """Do a job. The result is {"shape": ...} of the pixels in the mailbox, or says what is wrong."""
    limits = ImageLimits(**job["limits"])
    data = os.pread(mailbox, job["bytes"], 0)
    size_before = _mapped_bytes("VmSize")
    try:
        with _budget(limits, connection):
            pixels = _pixels(data, limits, job)
            write_whole(mailbox, pixels.data)
            reply: dict[str, Any] = {"shape": pixels.shape}
    except MemoryError:
        reply = {"memory": True}
    except (ImageError, RequestError) as error:
        reply = {"error": type(error).__name__, "message": str(error)[:_LONGEST_ERROR]}
    except Exception:
        reply = {"defect": traceback.format_exc()[-_LONGEST_ERROR:]}
    return {**reply, "memory_used": _mapped_bytes("VmPeak") - size_before}


def _pixels(data: bytes, limits: ImageLimits, job: dict[str, Any]) -> npt.NDArray[np.uint8]:
    """Decode to RGB [height, width, 3], or to tiles [tiles, 3, E, E] if the job has a tile size E."""
    image = load_image(data, limits)
    if job["tile_size"] is None:
        return np.ascontiguousarray(image)
    return cut_tiles(image, job["tile_size"], job["max_tiles"])


@contextlib.contextmanager
def _budget(limits: ImageLimits, connection: socket.socket) -> Iterator[None]:
    """Let the kernel end this process when it has used up its CPU time, or when its owner has gone."""
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_mapped_bytes("VmSize") + limits.max_decode_memory, unlimited[1]))
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    if _is_closed(connection):  # closed while SIGIO was ignored
        os._exit(0)
    signal.setitimer(signal.ITIMER_PROF, limits.max_decode_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_AS, unlimited)


def _mapped_bytes(name: str) -> int:
    """Read VmSize, the memory mapped now, or VmPeak, the most that ever was."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(f"{name}:"))


def _is_closed(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, 0)  # POLLHUP is reported always
    return bool(poll.poll(0))


def write_whole(mailbox: int, content: bytes | memoryview) -> None:
    """Write from the beginning of the mailbox."""
    view = memoryview(content).cast("B")
    written = 0
    while written < len(view):
        written += os.pwrite(mailbox, view[written:], written)


if __name__ == "__main__":
    main(int(sys.argv[1]))
