"""Tests that tritonserver's threads get large stacks, and this process keeps its limit."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from nvlm_trt.serving.triton.stack_limit import STACK_BYTES, large_stacks

SHOW = [sys.executable, "-c", "import resource; print(resource.getrlimit(resource.RLIMIT_STACK)[0])"]


def child_limit() -> int:
    return int(subprocess.run(SHOW, check=True, capture_output=True, text=True).stdout)


def test_a_child_has_large_stacks() -> None:
    before, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if hard != resource.RLIM_INFINITY and hard < STACK_BYTES:
        pytest.skip(f"the system allows no stack of more than {hard} bytes")
    with large_stacks():
        assert child_limit() == STACK_BYTES
    assert resource.getrlimit(resource.RLIMIT_STACK) == (before, hard)
    assert child_limit() == before


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((8 << 20, 64 << 20), 64 << 20),
        ((8 << 20, resource.RLIM_INFINITY), STACK_BYTES),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), STACK_BYTES),
    ],
)
def test_the_limit_follows_the_system(limits: tuple[int, int], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [limits]
    monkeypatch.setattr(resource, "getrlimit", lambda _: now[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: now.append(new))
    with pytest.raises(ValueError), large_stacks():
        assert now[-1] == (expected, limits[1])
        raise ValueError
    assert now[-1] == limits
