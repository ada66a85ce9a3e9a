"""lab/gpu_check.sh without a GPU: its messages, the report from a made JSON, the remains of a run that dies."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.gpu_check import report
from lab.gpu_check.__main__ import SECTIONS, main
from lab.gpu_check.record import (
    MEASURED,
    NOT_RUN,
    PASSED,
    SLOW,
    WRONG,
    Check,
    NotAvailableError,
    Record,
    Result,
    Trial,
    perform,
)

SCRIPT = Path(__file__).parents[3] / "lab" / "gpu_check.sh"
MADE = {
    "command": "lab/gpu_check.sh",
    "date": "2026-01-02",
    "seconds": 61.4,
    "machine": {"GPU": "Example 9000", "L2 MB": 62.9, "torch": "2.11.0"},
    "checks": [
        {"section": "ceilings", "name": "copy", "status": MEASURED, "values": {"copy GB/s": 4312.7}},
        {"section": "attention", "name": "decoding", "status": PASSED, "values": {"rms error": 0.00212}},
        {"section": "attention", "name": "pre|fill", "status": WRONG, "values": {"rms error": 1e30}},
        {"section": "attention-speed", "name": "decoding", "status": SLOW, "values": {"us": 31.26}, "note": "target"},
        {"section": "tensorrt", "name": "engines", "status": NOT_RUN, "note": "TensorRT is not installed"},
        {"section": "tensorrt", "name": "x", "status": WRONG, "note": "ValueError: y", "trace": "Traceback\n  y\n"},
    ],
}


def run(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": python, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=environment, check=False)


def made(tmp_path: Path) -> Path:
    path = tmp_path / "made.json"
    path.write_text(json.dumps(MADE))
    return path


def test_page(tmp_path: Path) -> None:
    assert main(["--render", str(made(tmp_path))]) == 0
    lines = (tmp_path / "made.md").read_text().splitlines()
    counts = "2 WRONG, 1 slower than its target, 1 passed, 1 measured, 1 not run"
    assert lines[2] == f"Made on 2026-01-02 by `lab/gpu_check.sh` in 61 s. {counts}."
    assert "| GPU | Example 9000 |" in lines
    assert "| check | result | copy GB/s |" in lines
    assert "| copy | measured | 4313 |" in lines
    assert "| pre\\|fill | WRONG | 1e+30 |" in lines
    assert "| decoding | slower than its target | 31.3 | target |" in lines
    assert "| engines | not run | TensorRT is not installed |" in lines
    assert lines[-6:] == ["tensorrt, x:", "", "```", "Traceback", "  y", "```"]
    assert json.loads((tmp_path / "made.json").read_text())["machine"] == MADE["machine"]


def test_the_page_names_the_code(tmp_path: Path) -> None:
    path = tmp_path / "made.json"
    path.write_text(json.dumps(MADE | {"code": {"commit": "1234567890abc", "changes": "fedcba09876"}}))
    assert main(["--render", str(path)]) == 0
    made = (
        "Made on 2026-01-02 by `lab/gpu_check.sh` with the code of commit 1234567890 with changes fedcba0987 in 61 s."
    )
    assert made in (tmp_path / "made.md").read_text()


def test_the_committed_page_is_made_from_the_committed_json(tmp_path: Path) -> None:
    docs = SCRIPT.parents[1] / "docs"
    assert report.page(report.load(docs / "gpu_report.json")) == (docs / "gpu_report.md").read_text()


def test_every_section_has_a_heading() -> None:
    assert {*SECTIONS, "tune"} == set(report.SECTIONS)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"checks": [{"name": 1}], "machine": {}}', '{"checks": []}'])
def test_other_json_is_refused_in_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    assert main(["--render", str(path)]) == 2
    assert main(["--render", str(tmp_path / "absent.json")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {path} is not the JSON of a report")
    assert second.startswith(f"error: cannot read {tmp_path / 'absent.json'}")
    assert not (tmp_path / "other.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tune", "--interpret"], "--tune, --interpret and --only exclude each other"),
        (["--only", "ceilings", "--tune"], "--tune, --interpret and --only exclude each other"),
        (["--interpret"], "--interpret needs --output DIRECTORY"),
    ],
)
def test_arguments_that_do_not_go_together(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run("--output", str(tmp_path / "report"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: torch ")
    assert "sees no GPU" in line
    assert not (tmp_path / "report").exists()


def test_without_python_or_torch(tmp_path: Path) -> None:
    absent = run(python=str(tmp_path / "python"))
    assert absent.returncode == 2
    assert "set PYTHON" in absent.stderr
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # no site-packages
    bare.chmod(0o755)
    done = run(python=str(bare))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "lacks torch, triton, numpy" in line


def test_trials_are_kept_whatever_becomes_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lacking() -> Result:
        raise NotAvailableError("no such thing here")

    def broken() -> Result:
        raise ValueError("first line\nsecond line")

    trials = [("good", lambda: Result(PASSED, {"us": 1.25}, "note")), ("lacking", lacking), ("broken", broken)]
    record = Record(tmp_path / "checks")
    perform("section", iter(trials), record, time.time() + 60)
    perform("section", iter([("late", broken)]), record, time.time())
    with record.path.open("a") as file:
        file.write('{"section": "cut off')
    good, absent, wrong, late = record.read()
    assert good == Check("section", "good", PASSED, {"us": 1.25}, "note")
    assert absent == Check("section", "lacking", NOT_RUN, note="no such thing here")
    assert (wrong.status, wrong.note) == (WRONG, "ValueError: first line")
    assert "second line" in wrong.trace
    assert late == Check("section", "late", NOT_RUN, note="the time was up")
    assert "us 1.25, note" in capsys.readouterr().out


def test_a_section_that_dies_or_hangs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lab.gpu_check import __main__ as command

    python = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    record = Record(tmp_path / "checks")
    for body, seconds in (("kill -SEGV $$", 60), ("exit 3", 60), ("sleep 100", command.RESERVE / 2 + 0.3)):
        python.write_text(f"#!/bin/sh\n{body}\n")
        python.chmod(0o755)
        command.run_apart("tile_resample", record, time.time() + seconds, interpret=False)
    assert [(check.status, check.note.split(";")[0]) for check in record.read()] == [
        (WRONG, "the process ended with SIGSEGV"),
        (WRONG, "the process ended with exit status 3"),
        (NOT_RUN, "the time was up"),
    ]


def test_a_section_in_parts_keeps_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lab.gpu_check import __main__ as command

    def trials(options: argparse.Namespace, record: Record) -> Iterator[Trial]:
        return ((str(number), lambda: Result(PASSED)) for number in range(20))

    count = command.PARTS["attention"]
    started = iter(range(count))

    class Part:
        """Does in this process what the section's process does. The third ends badly."""

        def __init__(self, arguments: list[str], **options: object) -> None:
            self.number = next(started)
            parsed = command.parser().parse_args(arguments[3:])
            assert parsed.part == [self.number, count]
            command.run_here(parsed)

        def wait(self, timeout: float) -> int:
            return -11 if self.number == 2 else 0

        def poll(self) -> int:
            return 0

    monkeypatch.setattr(command, "trials_of", trials)
    monkeypatch.setattr(command.subprocess, "Popen", Part)
    record = Record(tmp_path / "checks")
    command.run_apart("attention", record, time.time() + 60, interpret=False)
    checks = record.read()
    (dead,) = (check for check in checks if check.status == WRONG)
    assert dead.note.startswith("the process ended with SIGSEGV")
    assert [check.name for check in checks if check is not dead] == [str(number) for number in range(20)]


def test_in_the_interpreter(tmp_path: Path) -> None:
    """Goes the whole way: processes, trials, report. Needs no installed nvlm_trt: the script sets the import path."""
    pytest.importorskip("triton")
    done = run("--interpret", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_report.json").read_text())
    sections = {check["section"] for check in found["checks"]}
    assert sections == {"attention", "tile_resample"}
    assert set(found["code"]) in ({"commit"}, {"commit", "changes"}, {"sources"})
    assert {check["status"] for check in found["checks"]} <= {PASSED, NOT_RUN}  # Pillow may be absent or old
    assert "passed" in done.stdout.splitlines()[-1]
    assert "| float16: bits depend on nothing else | passed |" in (tmp_path / "gpu_report.md").read_text()
