"""The fixture of a process in which Triton interprets kernels."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import interpreted
import pytest
from child_process import child_process


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process that runs Triton's kernels on the CPU, one numpy operation at a time."""
    pytest.importorskip("triton", reason="needs triton: pip install 'nvlm-trt[test]'")
    with child_process({"TRITON_INTERPRET": "1"}) as executor:
        executor.submit(interpreted.multiply_row_by_row).result()
        yield executor
