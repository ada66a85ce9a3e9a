"""Writes a finished graph as an ONNX file with its weights beside it."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import onnx_ir as ir

from nvlm_trt.builders.data_file import DataFile
from nvlm_trt.builders.unfinished_build import UnfinishedBuild
from nvlm_trt.errors import NvlmError
from nvlm_trt.progress import Bytes, Progress

_INSIDE_BYTES = 256  # tensors up to this size are in the ONNX file itself


def save_model(model: ir.Model, path: Path, progress: Progress, unfinished: UnfinishedBuild | None = None) -> None:
    """Write PATH and PATH.data, and check the result. Memory holds a few rows of one tensor at a time.

    `unfinished`: the build that PATH.data belongs to, which may have written a part of it before."""
    stored = [
        (value, value.const_value)
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes > _INSIDE_BYTES
    ]
    file = DataFile(path.with_name(f"{path.name}.data"), [tensor for _, tensor in stored])
    file.write(lambda written: progress(path.stem, written, Bytes(file.nbytes)), unfinished)
    for (value, tensor), offset in zip(stored, file.offsets, strict=True):
        assert isinstance(tensor.shape, ir.Shape), "a stored tensor has a shape"
        assert tensor.name is not None, "a stored tensor has a name"
        value.const_value = ir.ExternalTensor(
            file.path.name,
            offset,
            tensor.nbytes,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
            base_dir=path.parent,
        )
    try:
        ir.save(model, path)
    except ir.serde.SerdeError as error:  # around every error of reading a tensor that is in PATH
        raise _cause(error) from None
    finally:
        for value, tensor in stored:
            value.const_value = tensor
    onnx.checker.check_model(os.fspath(path))


def _cause(error: Exception) -> BaseException:
    """Find the error of reading a tensor; an error while the message was written may hide it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (NvlmError, OSError)):
        cause = cause.__cause__ or cause.__context__
    return cause or error
