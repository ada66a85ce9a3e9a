"""Holds the process that tries constraints before this process compiles them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

from nvlm_trt.closing import ClosedOnExit
from nvlm_trt.constraint import Constraint
from nvlm_trt.errors import EngineError
from nvlm_trt.lane import IsOver, Lane, never
from nvlm_trt.runtime.grammar_trial_worker import CPU_SECONDS, MEMORY_BYTES

_CODE = "import sys; sys.path[:] = sys.argv[1:]; from nvlm_trt.runtime.grammar_trial_worker import main; main()"
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}  # a second arena would count as memory, though it has none
_TOO_MUCH = f"it takes more than {CPU_SECONDS} s or {MEMORY_BYTES >> 20} MiB to compile, or is nested too deeply"


class GrammarTrial(ClosedOnExit):
    """Tries one constraint at a time, in a process that is started when it is needed. Thread-safe."""

    def __init__(self) -> None:
        self._lane = Lane(1)
        self._process: subprocess.Popen[bytes] | None = None

    def fault(self, constraint: Constraint, is_over: IsOver = never) -> str | None:
        """Return what keeps an engine from following a constraint; None: nothing. Raises EngineError, and
        AbandonedError once `is_over` returns True before its turn."""
        job = f'{{"kind": "{constraint.kind}", "value": {constraint.to_json()}}}\n'.encode()
        with self._lane.turn(is_over):
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(OSError):  # it has ended, which the empty answer tells
                process.stdin.write(job)
                process.stdin.flush()
            answer = process.stdout.readline()
            if answer:
                fault: str | None = json.loads(answer)["fault"]
                return fault
            self._end()
            if process.returncode > 0:  # no signal: Python has said why
                raise EngineError("the process that tries constraints ended; see its message above")
        return _TOO_MUCH

    def close(self) -> None:
        """End the process."""
        with self._lane.turn():
            self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        """Return the process. Starts one if there is none, or if the one there was has ended."""
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None:
            # the path of imports is this process's: neither the folder it runs in nor -m adds to it
            command = [sys.executable or "python3", "-c", _CODE, *sys.path]
            environment = {**os.environ, **_ENVIRONMENT}
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
                )
            except OSError as error:
                raise EngineError(f"the process that tries constraints cannot be started ({error})") from None
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            with self._process as process, contextlib.suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()
        self._process = None
