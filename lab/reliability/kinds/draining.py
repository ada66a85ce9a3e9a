"""Sends signals to a server: with requests running, while it starts, and to all its processes."""

from __future__ import annotations

import os
import signal
import time

from lab.reliability.kind import Kind, kind
from lab.reliability.place import Place, require_answers
from lab.reliability.promise import require

KINDS: list[Kind] = []
_MOMENTS = (0.1, 0.7, 2.0, 5.0, 8.0)  # seconds after the start
_QUIETLY = "serve ends with status 0 and prints no error; nothing is left"


@kind(KINDS, "SIGTERM with 16 requests", "all requests finish, serve ends with status 0")
def _under_load(place: Place) -> None:
    served = place.serve()
    load = place.load(served, 8, images=True)
    more = place.load(served, 8, tokens=40)
    served.signal(signal.SIGTERM)
    load.require_finished()
    more.require_finished()
    served.require_ended(0)


@kind(KINDS, "SIGTERM and requests longer than the drain", "serve ends within 90 s; requests end with one line")
def _too_long(place: Place) -> None:
    served = place.serve()
    load = place.load(served, 8, tokens=4000)
    status = served.stop()
    load.ends()
    require(status == 0, f"serve ended with status {status}")


@kind(KINDS, "SIGTERM twice", "serve ends at once; requests end with one line")
def _twice(place: Place) -> None:
    served = place.serve()
    load = place.load(served, 8, tokens=4000)
    served.signal(signal.SIGTERM)
    time.sleep(0.5)
    started = time.monotonic()
    served.signal(signal.SIGTERM)
    served.require_ended(0, 20)
    require(time.monotonic() - started < 20, "the second signal did not hurry")
    load.ends()


@kind(KINDS, "SIGINT", "all requests finish, serve ends with status 0")
def _interrupt(place: Place) -> None:
    served = place.serve()
    load = place.load(served, 4)
    served.signal(signal.SIGINT)
    load.require_finished()
    served.require_ended(0)


@kind(KINDS, "SIGHUP: the terminal is closed", "the server goes along, nothing is left")
def _hangup(place: Place) -> None:
    served = place.serve()
    load = place.load(served, 4)
    served.signal(signal.SIGHUP)
    served.end()
    load.ends()
    served.require_nothing_left()


@kind(KINDS, "SIGTERM to the whole process group", _QUIETLY)
def _group(place: Place) -> None:
    served = place.serve()
    require_answers(served)
    os.killpg(served.process.pid, signal.SIGTERM)
    served.require_ended(0)


def _while_starting(number: signal.Signals) -> Kind:
    def check(place: Place) -> None:
        for moment in _MOMENTS:
            served = place.start()
            time.sleep(moment)
            served.signal(number)
            status = served.end()
            # before Python has installed a handler, the signal itself ends the process
            require(status in (0, -number, 128 + number, 130), f"after {moment} s: status {status}: {served.errors}")
            require("Traceback" not in served.errors or moment < 1, f"after {moment} s: a traceback")
            served.require_nothing_left()

    return Kind(f"{number.name} while the server starts, at {len(_MOMENTS)} moments", "it ends, nothing is left", check)


KINDS += [_while_starting(number) for number in (signal.SIGTERM, signal.SIGINT)]


@kind(KINDS, "SIGKILL while the server starts, at 5 moments", "nothing is left")
def _killed_starting(place: Place) -> None:
    for moment in _MOMENTS:
        served = place.start()
        time.sleep(moment)
        served.process.kill()
        served.end()
        served.require_nothing_left()
