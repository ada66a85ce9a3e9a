"""Builds one plan of TensorRT-RTX from one ONNX graph, in a process of its own. Needs no GPU."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from nvlm_trt.backends.plans.linter import check_graph
from nvlm_trt.backends.plans.network import one_line
from nvlm_trt.backends.plans.profiles import Profile
from nvlm_trt.backends.tensorrt_rtx import build_process
from nvlm_trt.backends.tensorrt_rtx.build_process import PlanAnswer, PlanOrder
from nvlm_trt.backends.tensorrt_rtx.options import RtxOptions
from nvlm_trt.backends.tensorrt_rtx.target import names_of
from nvlm_trt.errors import EngineError
from nvlm_trt.temporary import temporary_folder


def build_plan(
    graph: Path, plan: Path, profiles: Sequence[Profile], options: RtxOptions, fuse: bool, expected: int
) -> bool | None:
    """Build `graph` into the file `plan`. Return whether every attention has a fused kernel; None without attention.

    `fuse`: demand fused kernels where TensorRT-RTX has them. `expected`: bytes of host memory that an error about too
    little memory names.
    Raises EngineError if the linter or TensorRT-RTX refuses the graph, or if memory does not suffice; OSError if the
    plan cannot be written."""
    check_graph(graph, plugins=False)
    order = PlanOrder(str(graph), str(plan), list(profiles), list(options.targets), options.weight_streaming, fuse)
    failed = f"{graph.name} could not be built for {names_of(options.targets)}"
    memory = (
        f"the build was expected to take {expected / 1e9:.2f} GB of host memory; free memory, or choose a --precision "
        "with smaller weights"
    )
    try:
        answer = _run(order)
    except _NoAnswerError as death:
        raise EngineError(f"{failed}: the builder's process {death}, perhaps for lack of memory; {memory}") from None
    if answer.error is None:
        return answer.fused
    if answer.error_number is not None:
        raise OSError(answer.error_number, answer.error, str(plan))
    if answer.out_of_memory:
        raise EngineError(f"{failed}: out of memory; {memory}")
    raise EngineError(answer.error if answer.refused else f"{failed}: {answer.error}")


class _NoAnswerError(Exception):
    """The builder's process gave no answer. The message says how it ended."""


def _run(order: PlanOrder) -> PlanAnswer:
    """Let another process fulfil an order. The process ends with this call, however the call ends.

    Raises _NoAnswerError if the process ends without an answer."""
    with tempfile.TemporaryFile(dir=temporary_folder()) as messages:  # a pipe that nobody reads would fill up
        process = subprocess.Popen(
            [sys.executable, "-m", build_process.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it is dead already, and gives no answer
                process.stdin.write(json.dumps(asdict(order), allow_nan=False).encode() + b"\n")
                process.stdin.flush()
            answer = process.stdout.read()
            if not answer:
                process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        if answer:
            return PlanAnswer(**json.loads(answer))
        messages.seek(0)
        raise _NoAnswerError(_ending(process.returncode, messages.read().decode(errors="replace")))


def _ending(status: int, messages: str) -> str:
    """Return how a process ended, with the last line that it printed if it was not a signal that ended it."""
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    last = messages.strip().splitlines()[-1:]
    return f"gave up ({one_line(last[0]) if last else 'without a word'})"
