"""Turns the signals that stop a process into events."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from nvlm_trt.termination import TERMINATION_SIGNALS


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
