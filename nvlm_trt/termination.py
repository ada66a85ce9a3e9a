"""Lets a command that is told to end clean up first, and knows an error that is a signal in disguise."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

# `docker stop` and a service manager send SIGTERM, a closed terminal sends SIGHUP
TERMINATION_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def tidy_on_termination() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end this process as an error does, so that temporary folders are removed.

    The exit status is the shell's: 143 and 129. A signal that is ignored (nohup) or handled already is left as it is.
    Does nothing outside the main thread, which alone may handle signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = [number for number in TERMINATION_SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    for number in handled:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in handled:
            if signal.getsignal(number) is _end:
                signal.signal(number, signal.SIG_DFL)


def signal_behind(error: BaseException) -> KeyboardInterrupt | SystemExit | None:
    """Return what a signal raised while a module was imported, if `error` comes from that.

    A library in C++ makes an ImportError of whatever is raised during its import (pybind11: "initialization failed"),
    and errors of ours are made from ImportErrors."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        behind = [found.__cause__, found.__context__]
        if isinstance(found, ImportError):
            for other in behind:
                if isinstance(other, (KeyboardInterrupt, SystemExit)):
                    return other
        waiting += behind
    return None


def _end(number: int, frame: FrameType | None) -> None:
    for other in TERMINATION_SIGNALS:  # a second signal must not interrupt the cleaning up
        if signal.getsignal(other) is _end:
            signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)
