"""Progress bars on a terminal: they show the time left, also of work whose steps take minutes."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable

import pytest
from rich.console import Console

from nvlm_trt import terminal
from nvlm_trt.progress import Bytes


def drawn(monkeypatch: pytest.MonkeyPatch, description: str, done: Iterable[int], total: int) -> str:
    """Returns what a terminal gets of a bar that is reported once a minute, without the escape sequences."""
    seconds = 0.0
    console = Console(file=io.StringIO(), force_terminal=True, width=120, get_time=lambda: seconds)
    monkeypatch.setattr(terminal, "_stderr", console)
    with terminal.progress() as report:
        for number in done:
            report(description, number, total)
            seconds += 60
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def test_a_bar_shows_the_time_left_from_slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = drawn(monkeypatch, "calibrating", range(11), 100)
    assert re.search(r"calibrating .* 10% 0:11:00 1:30:00 left", shown), shown


def test_a_bar_of_bytes_shows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = drawn(monkeypatch, "decoder", range(0, 3 * 10**10, 10**10), Bytes(29 * 10**10))
    assert re.search(r"decoder .* left, 20.00 of 290.00 GB", shown), shown


def test_nothing_is_drawn_if_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO())
    monkeypatch.setattr(terminal, "_stderr", console)
    with terminal.progress() as report:
        report("calibrating", 1, 2)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().strip() == ""
