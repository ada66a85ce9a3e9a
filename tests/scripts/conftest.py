"""gpu_check is imported by name, as its script imports it; kernels run in a process where Triton interprets them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "plugins")]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    pytest.importorskip("triton", reason="needs triton: pip install 'nvlm-trt[test]'")
    from child_process import child_process

    with child_process({"TRITON_INTERPRET": "1"}) as executor:
        yield executor
