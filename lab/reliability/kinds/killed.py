"""Kills the processes of a server, one at a time, with SIGKILL."""

from __future__ import annotations

import signal

import psutil

from lab.reliability.kind import Kind, kind
from lab.reliability.load import answer_tokens
from lab.reliability.place import Place, require_answers
from lab.reliability.promise import BrokenPromise, require, wait_until

KINDS: list[Kind] = []
MODELS = ("nvlm", "tiling", "vision_encoder")
ENDS = "requests end with one line, serve ends with status 2 and one line, nothing is left"


@kind(KINDS, "serve killed", "requests end with one line, the server goes along, nothing is left")
def _serve(place: Place) -> None:
    served = place.serve()
    load = place.load(served)
    served.process.kill()
    served.end()
    load.ends()
    served.require_nothing_left()


@kind(KINDS, "guard killed", "requests go on, SIGTERM ends serve with status 0, nothing is left")
def _guard(place: Place) -> None:
    served = place.serve()
    load = place.load(served)
    psutil.Process(served.pid_of("guard")).kill()
    load.require_finished()
    require_answers(served)


@kind(KINDS, "serve and guard killed", "requests end with one line or go on; no process is left once they ended")
def _both(place: Place) -> None:
    served = place.serve()
    load = place.load(served)
    psutil.Process(served.pid_of("guard")).kill()
    served.process.kill()
    served.end()
    load.ends()
    left = [line for line in served.traces.left(30) if line.startswith("process")]
    require(not left, f"left behind: {', '.join(left)}")


@kind(KINDS, "tritonserver killed", ENDS)
def _tritonserver(place: Place) -> None:
    _kill(place, "tritonserver", "tritonserver was ended by SIGKILL")


def _kill(place: Place, role: str, told: str) -> None:
    served = place.serve()
    load = place.load(served)
    psutil.Process(served.pid_of(role)).send_signal(signal.SIGKILL)
    load.ends()
    last = served.require_ended(2)
    require(told in last, f"the line does not name {role}: {last}")
    served.require_nothing_left()


def _kill_model(model: str) -> Kind:
    def check(place: Place) -> None:
        _kill(place, model, f"the process of {model}")

    return Kind(f"model {model} killed", ENDS, check)


KINDS += [_kill_model(model) for model in MODELS]


def _kill_decoding(role: str) -> Kind:
    def check(place: Place) -> None:
        served = place.serve()
        require_answers(served)  # its image starts the processes that decode
        psutil.Process(served.pid_of(role)).kill()
        for seed in range(1, 4):
            try:
                answer_tokens(served.address, image=True, seed=seed)
            except BrokenPromise as broken:
                require(seed == 1, f"an image after the first: {broken}")

    return Kind(f"{role} killed", "the next image fails with one line at most, those after it are answered", check)


KINDS += [_kill_decoding(role) for role in ("image server", "image worker")]


@kind(KINDS, "a model killed while the server starts", "serve ends with status 2 and one line, nothing is left")
def _starting(place: Place) -> None:
    served = place.start()
    wait_until(lambda: "nvlm_0_0" in served.roles(), "no process of nvlm", 120)
    psutil.Process(served.pid_of("nvlm")).kill()
    served.require_ended(2, 120)
    served.require_nothing_left()
