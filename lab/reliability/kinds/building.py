"""Interrupts builds, and lets two of them write one engine."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from lab.reliability.kind import Kind, kind
from lab.reliability.place import Place, end_of
from lab.reliability.promise import require
from nvlm_trt.engine import Engine
from nvlm_trt.errors import NvlmError

KINDS: list[Kind] = []
_SHARES = (0.15, 0.4, 0.6, 0.75, 0.9, 0.97)  # of the time that a build takes


def require_whole(engine: Path) -> None:
    """Checks every file of an engine."""
    try:
        Engine.open(engine, full_check=True)
    except NvlmError as error:
        require(False, f"the engine is not whole: {error}")


def _left(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir()) if output.parent.exists() else []


def _timed(place: Place, output: Path) -> float:
    started = time.monotonic()
    status, last = end_of(place.build(output))
    require(status == 0, f"a build ended with status {status}: {last}")
    return time.monotonic() - started


def _interrupted(number: signal.Signals, statuses: tuple[int, ...]) -> Kind:
    def check(place: Place) -> None:
        seconds = _timed(place, place.folder / "first" / "engine")
        for share in _SHARES:
            output = place.folder / f"{share}" / "engine"
            build = place.build(output)
            time.sleep(share * seconds)
            build.send_signal(number)
            status, last = end_of(build)
            require(status in (*statuses, 0), f"at {share:.0%}: status {status}: {last}")
            left = [name for name in _left(output) if name != "engine"]
            require(not left, f"at {share:.0%}: left behind: {left}")
            require(status != 0 or output.exists(), f"at {share:.0%}: status 0 without an engine")
            if output.exists():  # the signal may come after the engine is published
                require_whole(output)

    promise = "no engine or a whole one, no temporary folder, exit status of the signal"
    return Kind(f"{number.name} during a build, at {len(_SHARES)} moments", promise, check)


KINDS += [
    _interrupted(signal.SIGTERM, (128 + signal.SIGTERM, -signal.SIGTERM)),
    _interrupted(signal.SIGINT, (130, -signal.SIGINT)),
]


@kind(KINDS, "SIGKILL during a build, at 6 moments", "no engine or a whole one; the next build succeeds")
def _killed(place: Place) -> None:
    output = place.folder / "engines" / "engine"
    seconds = _timed(place, place.folder / "first" / "engine")
    for share in _SHARES:
        build = place.build(output, "--overwrite")
        time.sleep(share * seconds)
        build.kill()
        end_of(build)
        if output.exists():
            require_whole(output)
    status, last = end_of(place.build(output, "--overwrite"))
    require(status == 0, f"the next build ended with status {status}: {last}")
    require_whole(output)


@kind(KINDS, "SIGKILL during a build that replaces an engine, at 6 moments", "the old engine or the new one is there")
def _replacing_killed(place: Place) -> None:
    output = place.folder / "engines" / "engine"
    seconds = _timed(place, output)
    for share in _SHARES:
        build = place.build(output, "--overwrite")
        time.sleep(share * seconds)
        build.kill()
        end_of(build)
        require(output.exists(), f"at {share:.0%}: no engine is there")
        require_whole(output)


@kind(KINDS, "two builds of one engine at once", "one succeeds, the other too or with one line; the engine is whole")
def _two(place: Place) -> None:
    output = place.folder / "engines" / "engine"
    for arguments in ((), ("--overwrite",)):
        builds = [place.build(output, *arguments) for _ in range(2)]
        ends = [end_of(build) for build in builds]
        statuses = sorted(status for status, _ in ends)
        require(statuses in ([0, 0], [0, 2]), f"they ended with {ends}")
        require(all(last.startswith("error: ") for status, last in ends if status), f"they ended with {ends}")
        require(_left(output) == ["engine"], f"left behind: {_left(output)}")
        require_whole(output)
