"""Runs a server in the foreground, until a signal stops it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from nvlm_trt.errors import NvlmError
from nvlm_trt.serving.triton.server import ServerOptions, TritonServer
from nvlm_trt.standard_streams import OutputError
from nvlm_trt.termination import TERMINATION_SIGNALS

_POLL_SECONDS = 0.2


class StopSignals:
    """Turns SIGINT, SIGTERM and SIGHUP into events: the first signal sets `stop`, the second `hurry`.

    SIGHUP stays ignored where it is: under nohup."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.hurry = threading.Event()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, *TERMINATION_SIGNALS):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stop.is_set():
            self.hurry.set()
        self.stop.set()


def run_in_foreground(engine: str | os.PathLike[str], options: ServerOptions | None = None) -> int:
    """Serves until SIGINT, SIGTERM or SIGHUP, finishes the open requests and returns 0.

    Raises what `TritonServer.start` raises, and ServerError if the server or one of its models dies.
    """
    server = TritonServer(engine, options)
    with StopSignals() as signals:
        try:
            if server.start(give_up=signals.stop):
                with contextlib.suppress(OutputError):  # nobody reads the line: no reason to end a server
                    print(
                        f"serving at {server.address} (HTTP {server.http_address}, {server.metrics_address})",
                        flush=True,
                    )
            while not signals.stop.wait(_POLL_SECONDS):
                server.check()
            server.stop(hurry=signals.hurry)
        except NvlmError:
            for line in server.log_tail:
                print(line, file=sys.stderr)
            raise
        finally:
            server.kill()
    return 0
