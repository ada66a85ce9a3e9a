"""Processes in which kernels are interpreted, and in which TensorRT's Python API is at hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from child_process import child_process

SHIM = Path(__file__).parents[2] / "scripts" / "tensorrt_shim.sh"
TENSORRT_VERSION = "11.4.0.106"


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process where Triton's kernels run on the CPU, one numpy operation at a time."""
    pytest.importorskip("triton", reason="needs triton: pip install 'nvlm-trt[test]'")
    with child_process({"TRITON_INTERPRET": "1"}) as executor:
        yield executor


@pytest.fixture(scope="session")
def tensorrt_process() -> Iterator[ProcessPoolExecutor]:
    """A process with TensorRT's real bindings and no builder. Its wheels are fetched once into the user's cache."""
    pytest.importorskip("triton", reason="needs triton: pip install 'nvlm-trt[test]'")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    shim = cache / "nvlm-trt" / f"tensorrt-shim-{TENSORRT_VERSION}-py{sys.version_info.major}{sys.version_info.minor}"
    if not shim.exists():
        if shutil.which("gcc") is None:
            pytest.skip("TensorRT's bindings need stub libraries, and there is no gcc to build them")
        environment = {**os.environ, "PYTHON": sys.executable, "TENSORRT_VERSION": TENSORRT_VERSION}
        made = subprocess.run([SHIM, shim], env=environment, capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"TensorRT's bindings cannot be had: {made.stderr.strip().splitlines()[-1]}")
    libraries = os.pathsep.join([str(shim / "lib"), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    with child_process({"LD_LIBRARY_PATH": libraries}, str(shim / "python")) as executor:
        yield executor
