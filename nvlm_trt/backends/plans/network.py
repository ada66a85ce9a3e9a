"""Parses graphs into NVIDIA's networks and streams plans to disk, for the builders of TensorRT and TensorRT-RTX.

`trt` is the module of either, `tensorrt` or `tensorrt_rtx_bindings`: both have the classes used here.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from nvlm_trt.errors import EngineError


def parse(parser: Any, graph: Path, remedy: str) -> None:
    """Parse an ONNX file. Raises EngineError, which names the node and ends with `remedy`."""
    if parser.parse_from_file(str(graph)):
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    first = f"{errors[0].node_name()} ({errors[0].node_operator()}): {one_line(errors[0].desc())}" if errors else "?"
    raise EngineError(f"{graph.name}: TensorRT's parser refuses {first}; {remedy}")


def stream_writer(trt: Any, file: Any) -> Any:
    """Return an IStreamWriter into an open file."""

    class StreamWriter(trt.IStreamWriter):
        """Writes a plan while TensorRT makes it, so that memory does not hold the plan twice."""

        def write(self, data: bytes) -> int:
            return int(file.write(data))

    return StreamWriter()


@functools.cache
def error_log(trt: Any) -> Any:
    """Return the ILogger of this process, with the list `errors` of messages; clear the list before a build.

    NVIDIA's libraries keep the first logger of a process. An IErrorRecorder written in Python, which would give error
    codes too, crashes the process when its builder is freed (seen with TensorRT-RTX 1.7.1)."""

    class ErrorLog(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(one_line(message))

    return ErrorLog()


def is_out_of_memory(error: str) -> bool:
    """Return whether a logged error says that memory does not suffice."""
    text = error.lower().replace(" ", "")
    return any(words in text for words in ("outofmemory", "bad_alloc", "couldnotbeallocated", "failedtoallocate"))


def one_line(error: object) -> str:
    """Return a message of NVIDIA's as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]
