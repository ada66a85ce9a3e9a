"""lab.build_in_little_memory on tiny layers, where this process may make a control group."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

from lab.build_in_little_memory import building
from lab.build_memory import write_sparse_checkpoint
from lab.control_group import control_group, run_in
from nvlm_trt.errors import EngineError
from nvlm_trt.model.presets import PRESETS

ENOUGH_MB = 1500


@pytest.fixture(autouse=True)
def groups_can_be_made() -> None:
    try:
        with control_group(ENOUGH_MB * 1_000_000):
            pass
    except EngineError as error:
        pytest.skip(str(error))


def test_a_build_is_measured(tmp_path: Path) -> None:
    write_sparse_checkpoint(tmp_path / "checkpoint", PRESETS["nvlm-h-tiny"], shards=2)
    measured = building(tmp_path / "checkpoint", "bf16", ENOUGH_MB)()
    assert measured["engine GB"] > 0.001
    assert 50 < measured["not of files MB"] < ENOUGH_MB
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_the_limit_holds() -> None:
    """A process that takes more than its group may have is killed, and says so."""
    with control_group(100_000_000) as group, contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(EngineError, match="ended with status -9"))
        run_in(group, [sys.executable, "-c", "taken = bytearray(b'1') * (300 << 20)"])
