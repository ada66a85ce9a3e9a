"""Stops the processes of a server with SIGSTOP for a while, or for good."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import psutil

from lab.reliability.kind import Kind, kind
from lab.reliability.load import answer_tokens
from lab.reliability.place import Place, require_answers
from lab.reliability.promise import require
from lab.reliability.served import Served

KINDS: list[Kind] = []
_PAUSE_SECONDS = 3.0
GOES_ON = "requests wait and finish after SIGCONT, the server answers"


@contextlib.contextmanager
def stopped(served: Served, role: str) -> Iterator[None]:
    """Stops a process for the time of the block."""
    process = psutil.Process(served.pid_of(role))
    process.suspend()
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


@kind(KINDS, "serve stopped", "the server answers meanwhile, and ends with status 0 after SIGCONT")
def _serve(place: Place) -> None:
    served = place.serve()
    with stopped(served, "serve"):
        require_answers(served, "while serve is stopped")
        time.sleep(_PAUSE_SECONDS)
    require_answers(served)


@kind(KINDS, "guard stopped", "the server answers, SIGTERM ends serve with status 0; nothing is left after SIGCONT")
def _guard(place: Place) -> None:
    served = place.serve()
    with stopped(served, "guard"):
        require_answers(served, "while the guard is stopped")
        status = served.stop()
    require(status == 0, f"serve ended with status {status}: {served.errors.strip()[-300:]}")


def _pause(role: str) -> Kind:
    def check(place: Place) -> None:
        served = place.serve()
        load = place.load(served)
        with stopped(served, role):
            time.sleep(_PAUSE_SECONDS)
        load.require_finished()
        require_answers(served)

    return Kind(f"{role} stopped for {_PAUSE_SECONDS:.0f} s", GOES_ON, check)


def _for_good(role: str) -> Kind:
    def check(place: Place) -> None:
        served = place.serve()
        load = place.load(served, tokens=3000)
        with stopped(served, role):
            status = served.stop()
        require(status == 0, f"serve ended with status {status}: {served.errors.strip()[-300:]}")
        load.ends()

    return Kind(
        f"{role} stopped for good, then SIGTERM",
        "serve ends within its 30 s of draining and 60 s more; requests end with one line",
        check,
    )


@kind(KINDS, "image worker stopped for 3 s", "images wait or fail with one line; those after it are answered")
def _decoding(place: Place) -> None:
    served = place.serve()
    require_answers(served)
    with stopped(served, "image worker"):
        time.sleep(_PAUSE_SECONDS)
        require_answers(served, "while an image worker is stopped")  # these are cached
    for seed in (1, 2):
        answer_tokens(served.address, image=True, seed=seed)


KINDS += [_pause(role) for role in ("tritonserver", "nvlm", "tiling", "vision_encoder")]
KINDS += [_for_good(role) for role in ("tritonserver", "nvlm")]
