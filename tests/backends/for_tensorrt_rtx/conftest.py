"""Compares these backends with engines of ONNX Runtime that compute everything in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def engine(exact_engine: Callable[[str], Path]) -> Callable[[str], Path]:
    return exact_engine
