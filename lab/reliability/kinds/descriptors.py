"""Lets a server have few file descriptors."""

from __future__ import annotations

import contextlib
import resource

from lab.reliability.kind import Kind
from lab.reliability.kinds.clients import connect, require_idle
from lab.reliability.place import Place, require_answers
from lab.reliability.promise import require
from lab.reliability.served import limited

KINDS: list[Kind] = []


def _few(count: int) -> Kind:
    def check(place: Place) -> None:
        served = place.start(preexec_fn=limited(resource.RLIMIT_NOFILE, count))
        if not served.is_ready_or_ended():
            served.require_ended(2)
            return
        load = place.load(served, 16)
        load.require_finished()
        require_answers(served)

    return Kind(f"ulimit -n {count}", "the server answers 16 requests at once, or ends with one line", check)


def _crowd(count: int) -> Kind:
    def check(place: Place) -> None:
        served = place.start(preexec_fn=limited(resource.RLIMIT_NOFILE, count))
        if not served.is_ready_or_ended():
            served.require_ended(2)
            return
        with contextlib.ExitStack() as opened:
            for _ in range(count + 50):
                with contextlib.suppress(OSError):
                    opened.enter_context(connect(served, served.http_address))
        require(served.process.poll() is None, f"serve ended: {served.errors.strip()[-300:]}")
        require_idle(served)

    promise = "the server answers when they are gone"
    return Kind(f"ulimit -n {count} and more connections than that", promise, check)


KINDS += [_few(64), _few(256), _crowd(256)]
