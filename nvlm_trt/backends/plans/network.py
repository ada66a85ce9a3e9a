"""Parses graphs into NVIDIA's networks and streams plans to disk, for the builders of TensorRT and TensorRT-RTX.

`trt` is the module of either, `tensorrt` or `tensorrt_rtx_bindings`: both have the classes used here.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from nvlm_trt.errors import EngineError

# in lower case, without spaces; "resource ..." is what a thread says that cannot start
_OUT_OF_MEMORY = (
    "outofmemory",
    "bad_alloc",
    "couldnotbeallocated",
    "failedtoallocate",
    "cannotallocatememory",
    "resourcetemporarilyunavailable",
)


def parse(parser: Any, graph: Path, remedy: str) -> None:
    """Parse an ONNX file. Raises EngineError, which names the node and ends with `remedy`."""
    if parser.parse_from_file(str(graph)):
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    first = f"{errors[0].node_name()} ({errors[0].node_operator()}): {one_line(errors[0].desc())}" if errors else "?"
    raise EngineError(f"{graph.name}: TensorRT's parser refuses {first}; {remedy}")


def build_to_file(trt: Any, builder: Any, network: Any, config: Any, plan: Path) -> bool:
    """Build a network and write its plan while the builder makes it, so that memory does not hold the plan twice.

    Return False if the builder logged why it failed. Raises OSError if the file cannot be written."""

    class StreamWriter(trt.IStreamWriter):
        """Keeps the error of a write: NVIDIA's libraries print it and go on as if everything were written."""

        def __init__(self) -> None:
            super().__init__()
            self.failure: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return 0 if self.failure else int(file.write(data))
            except OSError as error:
                self.failure = error
                return 0

    with plan.open("wb") as file:
        writer = StreamWriter()
        built = builder.build_serialized_network_to_stream(network, config, writer)
        if writer.failure:
            raise writer.failure
    return bool(built)


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
    return any(words in text for words in _OUT_OF_MEMORY)


def one_line(error: object) -> str:
    """Return a message of NVIDIA's as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]
