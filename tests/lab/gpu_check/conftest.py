"""A process in which Triton interprets the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
from child_process import child_process


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    pytest.importorskip("triton", reason="needs triton: pip install 'nvlm-trt[test]'")
    with child_process({"TRITON_INTERPRET": "1"}) as executor:
        yield executor
