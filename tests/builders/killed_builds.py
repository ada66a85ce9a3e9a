"""Builds engines in processes of their own, which SIGKILL ends at chosen moments.

Run as a program, it reads one order a line (JSON) and fulfils each in a fork of itself: a process costs milliseconds
where importing the builders costs seconds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BLOCK_ELEMENTS = 1 << 13  # of tiny models: several blocks in a tensor, and most tensors are not whole at a sync
STRIP_BYTES = 1 << 14
SYNC_BYTES = 1 << 18


class Builds:
    """A process that builds. A context manager."""

    def __init__(self) -> None:
        root = Path(__file__).parents[2]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
        self._process = subprocess.Popen(
            [sys.executable, "-u", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root,
            env=environment,
        )  # fmt: skip

    def build(self, checkpoint: Path, output: Path, **order: Any) -> Mapping[str, Any]:
        """Build, and return what the build reported: how it ended, progress `events`, `seconds`, lines it `told`.

        `kill_event`: the number of the report of progress during which the build kills itself; `kill_at`: instead, its
        stage and the share that is done; `kill_after`: seconds after which it is killed from outside."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = json.dumps({"checkpoint": str(checkpoint), "output": str(output), **order})
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that builds has died"
        result: Mapping[str, Any] = json.loads(answer)
        return result

    def __enter__(self) -> Builds:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def main() -> None:
    from nvlm_trt.builders import engine_build, file_writes
    from nvlm_trt.builders.graphs import streamed

    streamed._BLOCK_ELEMENTS, streamed._STRIP_BYTES = BLOCK_ELEMENTS, STRIP_BYTES
    file_writes._SYNC_BYTES = SYNC_BYTES
    for line in sys.stdin:
        order = json.loads(line)
        after = order.pop("kill_after", None)
        reader, writer = os.pipe()
        started = time.monotonic()
        process = os.fork()
        if process == 0:
            os.close(reader)
            status = 1
            try:
                os.write(writer, _build(engine_build, order).encode())
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(writer)
        if after is not None:
            time.sleep(after)
            os.kill(process, signal.SIGKILL)
        with os.fdopen(reader) as answers:
            answer = answers.read()
        _, status = os.waitpid(process, 0)
        result = json.loads(answer) if answer else {}
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or status == 0, f"the build ended with {status}"
        print(json.dumps({"killed": killed, "seconds": time.monotonic() - started, **result}), flush=True)


def _build(engine_build: Any, order: dict[str, Any]) -> str:
    events, told = 0, []
    kill_event, (kill_stage, kill_share) = order.pop("kill_event", None), order.pop("kill_at", (None, 0))
    calibration = order.pop("calibration", None)

    def progress(description: str, done: float, total: float) -> None:
        nonlocal events
        events += 1
        if events == kill_event or (description == kill_stage and done > kill_share * total):
            os.kill(os.getpid(), signal.SIGKILL)

    quantization = engine_build.QuantizationOptions(Path(calibration) if calibration else None, gate=None)
    engine_build.build_engine(
        order.pop("checkpoint"), order.pop("output"), progress=progress, smoke_test=False, quantization=quantization,
        tell=told.append, **order,
    )  # fmt: skip
    return json.dumps({"events": events, "told": told})


if __name__ == "__main__":
    main()
