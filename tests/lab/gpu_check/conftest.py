"""A process in which Triton interprets the kernels, and engines for TensorRT-RTX."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from child_process import child_process
from filelock import FileLock


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    pytest.importorskip("triton", reason="needs triton: pip install 'nvlm-trt[test]'")
    with child_process({"TRITON_INTERPRET": "1"}) as executor:
        yield executor


@pytest.fixture(scope="session")
def engines(shared_folder: Path) -> Path:
    """A directory that rtx_engines.py wrote, with one engine: nvlm-h-tiny in bf16."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="needs TensorRT-RTX: pip install 'nvlm-trt[tensorrt-rtx]'")
    from lab.gpu_check import rtx_engines

    directory = shared_folder / "rtx-engines"
    with FileLock(shared_folder / "rtx-engines.lock"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        if not directory.exists():
            arguments = [str(directory), "--model", "nvlm-h-tiny", "--precision", "bf16", "--jobs", "1"]
            assert rtx_engines.main(arguments) == 0
    return directory
