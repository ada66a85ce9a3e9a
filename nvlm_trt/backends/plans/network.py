"""Parses graphs into NVIDIA's networks and streams plans to disk, for the builders of TensorRT and TensorRT-RTX.

`trt` is the module of either, `tensorrt` or `tensorrt_rtx_bindings`: both have the classes used here.
"""

from __future__ import annotations

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


def error_recorder(trt: Any) -> Any:
    """Return an IErrorRecorder with the list `errors` of (code, text)."""

    class ErrorRecorder(trt.IErrorRecorder):
        """Keeps the errors that TensorRT would only log."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[tuple[Any, str]] = []

        def report_error(self, code: Any, description: str) -> bool:
            self.errors.append((code, description))
            return False

        def num_errors(self) -> int:
            return len(self.errors)

        def get_error_code(self, index: int) -> Any:
            return self.errors[index][0]

        def get_error_desc(self, index: int) -> str:
            return self.errors[index][1]

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            self.errors.clear()

    return ErrorRecorder()


def one_line(error: object) -> str:
    """Return a message of NVIDIA's as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]
