"""Changes the files of an engine while it is served."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess

from lab.reliability.kind import Kind, kind
from lab.reliability.load import answer_tokens
from lab.reliability.place import Place, end_of, require_answers
from lab.reliability.promise import BrokenPromise, require

KINDS: list[Kind] = []
_END_SECONDS = 10.0
SAME = "requests go on, the answers stay the same"


@kind(KINDS, "engine rebuilt while it is served", SAME)
def _rebuilt(place: Place) -> None:
    engine = place.own_engine()
    served = place.serve(engine)
    before = [answer_tokens(served.address, image) for image in (False, True)]
    load = place.load(served)
    status, last = end_of(place.build(engine, "--overwrite"))
    require(status == 0, f"the build ended with status {status}: {last}")
    load.require_finished()
    after = [answer_tokens(served.address, image) for image in (False, True)]
    require(after == before, "other answers than before")


@kind(KINDS, "engine removed while it is served", SAME)
def _removed(place: Place) -> None:
    engine = place.own_engine()
    served = place.serve(engine)
    before = [answer_tokens(served.address, image) for image in (False, True)]
    load = place.load(served)
    shutil.rmtree(engine)
    load.require_finished()
    after = [answer_tokens(served.address, image) for image in (False, True)]
    require(after == before, "other answers than before")


@kind(KINDS, "weights cut in place while they are served", "answers stay the same, or serve ends with one line")
def _truncated(place: Place) -> None:
    engine = place.own_engine()
    served = place.serve(engine)
    before = answer_tokens(served.address)
    weights = max(engine.iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(weights, 0)
    try:
        require(answer_tokens(served.address) == before, "another answer than before")
    except BrokenPromise:
        with contextlib.suppress(subprocess.TimeoutExpired):
            served.process.wait(_END_SECONDS)
        if served.process.poll() is None:
            raise
        served.require_ended(2)


@kind(KINDS, "engine cut before it is served", "serve ends with status 2 and one line that names the file")
def _broken(place: Place) -> None:
    engine = place.own_engine()
    weights = max(engine.iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(weights, weights.stat().st_size // 2)
    last = place.start(engine).require_ended(2, 120)
    require(weights.name in last, f"the line does not name {weights.name}: {last}")


@kind(KINDS, "two servers of one engine", "both answer the same; each ends alone")
def _two(place: Place) -> None:
    first, second = place.serve(), place.serve()
    require(answer_tokens(first.address) == answer_tokens(second.address), "they answer differently")
    require(first.stop() == 0, f"the first ended with status {first.process.returncode}")
    require_answers(second, "after the other has ended")
