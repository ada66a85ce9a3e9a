"""Writes a finished graph as an ONNX file with its weights beside it."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import onnx_ir as ir

from nvlm_trt.progress import Progress


def save_model(model: ir.Model, path: Path, progress: Progress) -> None:
    """Write PATH and PATH.data, and check the result. Memory holds a few rows of one tensor at a time."""

    def report(tensor: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        progress(path.stem, info.index + 1, info.total)

    # page-aligned, so that ONNX Runtime maps the tensors that it does not repack
    ir.save(model, path, external_data=f"{path.name}.data", alignment=4096, callback=report)
    onnx.checker.check_model(os.fspath(path))
