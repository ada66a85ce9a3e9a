"""Fuzzes the decoder with a fixed seed, and sees planted faults."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import planted_decoders
import pytest

from lab.reliability import fuzz
from lab.reliability.decode_worker import DECODER, DecodeWorker, decode_and_tile
from lab.reliability.file_cases import file_case
from lab.reliability.file_fuzz import FileCounts, FileFuzz
from lab.reliability.finding import Finding
from lab.reliability.valid_files import valid_files

SEED = 1
CRASH = "the process died with status -6"


def fuzzed(decoder: str, files: int, budget: float = 30.0) -> tuple[FileCounts, list[Finding]]:
    counts = FileCounts()
    course = FileFuzz(SEED, decoder, counts, workers=2, budget=budget)
    findings = [finding for block in course.run(files, 50, time.monotonic() + 120) for finding in block]
    return counts, findings


def numbers_with_pattern(files: int) -> set[int]:
    return {number for number in range(files) if planted_decoders.PATTERN in file_case(SEED, number).data}


def test_damaged_files_are_decoded_or_refused() -> None:
    counts, findings = fuzzed(DECODER, 400)
    assert [finding.line for finding in findings] == []
    assert counts.done == counts.decoded + counts.refused == 400
    assert min(counts.decoded, counts.refused) > 50
    assert not counts.leaks


@pytest.mark.parametrize("file", [file for file in valid_files() if file.read], ids=lambda file: file.name)
def test_valid_files_of_every_format_are_decoded(file) -> None:
    assert len(decode_and_tile(file.data)) >= 1


@pytest.mark.parametrize(
    ("decoder", "fault", "budget"),
    [
        ("crashes", CRASH, 30.0),
        ("hangs", "no answer within 1 s", 1.0),
        ("raises", "KeyError instead of an ImageError", 30.0),
        ("babbles", "not one short, printable line", 30.0),
    ],
)
def test_a_planted_fault_is_seen(decoder: str, fault: str, budget: float) -> None:
    files = 11 if decoder == "hangs" else 24
    counts, findings = fuzzed(f"planted_decoders:{decoder}", files, budget)
    assert {finding.number for finding in findings if fault in finding.fault} == numbers_with_pattern(files) != set()
    assert counts.faults == len(findings)


def test_a_valid_file_that_is_refused_is_seen() -> None:
    _, findings = fuzzed("planted_decoders:refuses", 100)
    assert {finding.number for finding in findings} == {n for n in range(100) if file_case(SEED, n).read} != set()


def test_a_planted_leak_is_seen() -> None:
    counts, _ = fuzzed("planted_decoders:leaks", 200)
    assert counts.leaks
    assert counts.growth_mb > 20


def test_a_number_is_the_same_file_in_every_process() -> None:
    code = (
        "import hashlib; from lab.reliability.file_cases import file_case; "
        f"print(hashlib.sha256(b''.join(file_case({SEED}, n).data for n in range(60))).hexdigest())"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(outputs) == 1


def test_a_finding_is_kept_and_brought_about_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, findings = fuzzed("planted_decoders:crashes", 20)
    path = findings[0].write(tmp_path)
    assert Finding.read(path) == findings[0]
    words = ["--work", str(tmp_path), "--decoder", "planted_decoders:crashes", "--replay", str(path)]
    arguments = fuzz.options().parse_args(words)
    assert fuzz.replay(arguments, Finding.read(path)).faults == [CRASH]
    assert f"now: fault {CRASH}" in capsys.readouterr().err
    arguments.decoder = DECODER
    assert fuzz.replay(arguments, findings[0]).faults == []


def test_a_process_that_died_is_replaced() -> None:
    number = min(numbers_with_pattern(40))
    worker = DecodeWorker(SEED, "planted_decoders:crashes", 30)
    try:
        assert worker.run(number).detail == CRASH
        other = next(n for n in range(40) if n not in numbers_with_pattern(40))
        assert worker.run(other).verdict in ("decoded", "refused")
    finally:
        worker.close()
