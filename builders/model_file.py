"""Writes a finished graph as an ONNX file with its weights beside it."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import onnx_ir as ir

from nvlm_trt.errors import NvlmError
from nvlm_trt.progress import Progress


def save_model(model: ir.Model, path: Path, progress: Progress) -> None:
    """Write PATH and PATH.data, and check the result. Memory holds a few rows of one tensor at a time."""

    def report(tensor: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        progress(path.stem, info.index + 1, info.total)

    # page-aligned, so that ONNX Runtime maps the tensors that it does not repack
    try:
        ir.save(model, path, external_data=f"{path.name}.data", alignment=4096, callback=report)
    except ir.serde.SerdeError as error:  # around every error of reading a tensor that is not in PATH.data
        raise _cause(error) from None
    onnx.checker.check_model(os.fspath(path))


def _cause(error: Exception) -> BaseException:
    """Find the error of reading a tensor; an error while the message was written may hide it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (NvlmError, OSError)):
        cause = cause.__cause__ or cause.__context__
    return cause or error
