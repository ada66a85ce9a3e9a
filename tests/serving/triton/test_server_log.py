"""Tests that the log of a server stays small, whatever the server prints."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nvlm_trt.serving.triton import server_log
from nvlm_trt.serving.triton.server_log import ServerLog

LINE = b"[warn] Error from accept() call: Too many open files\n"


def printed(path: Path, data: bytes, clock: Callable[[], float] = lambda: 0.0) -> ServerLog:
    """Makes a log of a process that has printed `data` and ended."""
    log = ServerLog(path, clock)
    with os.fdopen(os.dup(log.write_end), "wb") as process:
        log.close_write_end()
        process.write(data)
    log.settle()
    return log


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_everything_is_kept_of_a_server_that_prints_little(tmp_path: Path) -> None:
    log = printed(tmp_path / "log", b"one\n| a table |\ntwo\n")
    assert (tmp_path / "log").read_bytes() == b"one\n| a table |\ntwo\n"
    assert log.tail(5) == ["one", "two"]
    assert log.tail(1) == ["two"]
    assert not log.out_of_descriptors


def test_a_flood_is_left_out_and_keeps_what_came_before(tmp_path: Path) -> None:
    log = printed(tmp_path / "log", b"first\n" + LINE * 400_000)  # 21 MB
    assert size(tmp_path) < 5 << 20
    assert (tmp_path / "log").read_bytes().startswith(b"first\n")
    assert log.out_of_descriptors
    assert log.tail(1) == [LINE.decode().strip()]


def test_a_file_is_followed_by_another(tmp_path: Path) -> None:
    time = iter(range(0, 10**9, 1000))
    printed(tmp_path / "log", LINE * 500_000, clock=lambda: next(time))  # each read finds a full allowance
    assert {file.name for file in tmp_path.iterdir()} == {"log", "log.1"}
    assert 8 << 20 < size(tmp_path) <= 16 << 20


def test_bytes_left_out_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_log, "_READ_BYTES", 4)
    times = iter([0.0, 0.0, 0.0, 100.0])
    monkeypatch.setattr(server_log, "_BURST_BYTES", 5)
    printed(tmp_path / "log", b"abc\ndef\nghi\n", clock=lambda: next(times))
    expected = b"abc\n\n[4 bytes were left out here: more than the log takes]\nghi\n"
    assert (tmp_path / "log").read_bytes() == expected


def test_the_log_goes_on_without_its_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    log = ServerLog(tmp_path / "folder" / "log")
    shutil.rmtree(tmp_path / "folder")
    with os.fdopen(os.dup(log.write_end), "wb") as process:
        log.close_write_end()
        process.write(LINE * 400_000 + b"last\n")
    log.settle()
    assert log.tail(1) == ["last"]


def test_a_message_that_two_reads_cut_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_log, "_READ_BYTES", 5)
    assert printed(tmp_path / "log", LINE).out_of_descriptors
