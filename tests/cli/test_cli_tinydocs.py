"""Tests that `nvlm-trt eval --samples` reads the files that `nvlm-trt tinydocs` writes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nvlm_trt.evaluation.samples import read_samples
from nvlm_trt.evaluation.tinydocs import TASKS, TEXT_TASKS, generate

COMMAND = [sys.executable, "-m", "nvlm_trt.cli", "tinydocs"]


def tinydocs(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_the_files_are_the_samples(tmp_path: Path) -> None:
    result = tinydocs("--count", 2, "--output", tmp_path / "out", "--split", "validation")
    assert result.returncode == 0, result.stderr
    written = read_samples(tmp_path / "out" / "samples.jsonl")
    drawn = list(generate("validation", (*TASKS, *TEXT_TASKS), 2))
    assert [(s.name, s.task, s.prompt, s.answer, s.metric) for s in written] == [
        (s.name, s.task, s.prompt, s.answer, s.metric) for s in drawn
    ]
    assert [list(s.images) for s in written] == [list(s.images) for s in drawn]
    assert [len(s.images) for s in written if s.task == "pair"] == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "ocr,poem"], "error: task 'poem' is not one of ocr, form"),
        (["--split", "dev"], "error: split 'dev' is not one of train, validation, test"),
        (["--tasks", ""], "error: task '' is not one of"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = tinydocs("--output", tmp_path / "out", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_nothing_can_be_written() -> None:
    done = tinydocs("--count", 1, "--output", "/proc/tinydocs")
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write /proc/tinydocs (")
    assert done.stderr.count("\n") == 1


def test_what_exists_is_kept_unless_told(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    refused = tinydocs("--count", 1, "--tasks", "copy", "--output", tmp_path / "out")
    assert refused.returncode == 2
    assert "exists; choose another directory or pass --overwrite" in refused.stderr
    refused = tinydocs("--count", 1, "--tasks", "copy", "--output", tmp_path / "out", "--overwrite")
    assert "holds no samples.jsonl, so it is not overwritten" in refused.stderr
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    (tmp_path / "out" / "mine.txt").rename(tmp_path / "out" / "samples.jsonl")
    assert tinydocs("--count", 1, "--tasks", "copy", "--output", tmp_path / "out", "--overwrite").returncode == 0
    line = json.loads((tmp_path / "out" / "samples.jsonl").read_text())
    assert line.keys() == {"name", "task", "prompt", "answer", "metric"}


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=str
)
def test_an_interrupt_leaves_nothing(tmp_path: Path, number: signal.Signals, status: int) -> None:
    process = subprocess.Popen([*COMMAND, "--count", "5000", "--output", str(tmp_path / "out")], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) == status
    assert list(tmp_path.iterdir()) == []
