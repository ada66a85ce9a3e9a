"""Defines the result of `run_cli` (conftest.py) for tests of the command line."""

from __future__ import annotations

from collections.abc import Callable

Result = tuple[int, str, str]  # exit status, stdout, stderr
Run = Callable[..., Result]


def assert_one_line_error(result: Result, *fragments: str) -> None:
    status, out, err = result
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    for fragment in fragments:
        assert fragment in err
