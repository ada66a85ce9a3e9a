"""Ends a tritonserver once its open requests are answered."""

from __future__ import annotations

import threading
import time

from nvlm_trt.serving.triton.drain_channel import ENCODED, IDLE, DrainChannel
from nvlm_trt.serving.triton.http_probe import keep_open
from nvlm_trt.serving.triton.process import TritonProcess

# for the server's own exit, after its last answer
EXIT_SECONDS = 5
_POLL_SECONDS = 0.1
_NVLM = "nvlm_0_0"  # the instance of the model, as process_watch names it


def stop_process(
    process: TritonProcess, channel: DrainChannel, host: str, http_port: int, seconds: float, hurry: threading.Event
) -> None:
    """Refuse new requests, wait up to `seconds` for the open ones, and let the server exit. Returns when `hurry` is
    set; the caller kills what still runs.

    SIGTERM makes the server stop listening for HTTP at once, so a readiness probe fails. Then it waits until its HTTP
    connections are closed, and only after that it calls itself not ready over gRPC and refuses all requests, also those
    that `nvlm` sends for its images. So a connection is kept open until all images are encoded."""
    deadline = time.monotonic() + seconds

    def give_up() -> bool:
        """The other models may have ended: the server unloads them before `nvlm` has answered its last request."""
        return hurry.is_set() or time.monotonic() > deadline or _NVLM in process.dead_models()

    held = keep_open(host, http_port)
    channel.tell()
    if held is not None:
        process.terminate()
    encoded = channel.wait_for(ENCODED, give_up)
    if held is None:
        process.terminate()
    else:
        held.close()
    if encoded and channel.wait_for(IDLE, give_up):
        _wait_for_exit(process, hurry)


def _wait_for_exit(process: TritonProcess, hurry: threading.Event) -> None:
    deadline = time.monotonic() + EXIT_SECONDS
    while process.exit_status is None and time.monotonic() < deadline and not hurry.is_set():
        process.wait(_POLL_SECONDS)
