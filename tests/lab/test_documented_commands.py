"""The commands of the pages: they exist and take their options, and one of them measures in a fresh clone."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lab.common import RESULTS

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"(?<![\w./])python -m (lab\.[\w.]+)((?: [^`\n#]*)?)")
TOY = """
import pathlib

def toy():
    calls = pathlib.Path(__file__).with_name("calls")
    number = len(calls.read_text()) if calls.exists() else 0
    calls.write_text("x" * (number + 1))
    return {"toys/s": 7000.0 + number}
"""


def texts() -> dict[str, str]:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("training/*"), *ROOT.glob("lab/**/*.py")]
    pages += [*ROOT.glob("lab/**/*.sh"), *ROOT.glob("checkpoints/*/README.md")]
    return {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in pages if page.is_file()}


def commands() -> set[tuple[str, str]]:
    found = {match.groups() for text in texts().values() for match in COMMAND.finditer(text)}
    return {(module, arguments) for module, arguments in found if not module.startswith("lab.peers.")}


def test_there_is_one_way_to_run_lab() -> None:
    other = re.compile(r"\bpython\d? (?:lab|benchmarks)/|(?<!results/)\blab/\w+\.py\b|\bbenchmarks/|scripts/gpu_check")
    wrong = {name: other.findall(text) for name, text in texts().items() if not name.startswith("lab/")}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_every_documented_command_takes_its_options() -> None:
    found = commands()
    assert {module for module, _ in found} >= {f"lab.{name}" for name in ("decode_peers", "quantization_table")}
    for module, arguments in found:
        options = importlib.import_module(module).options()
        words = shlex.split(arguments.replace("[", "").replace("]", ""))
        if words:
            options.parse_args(words)


def test_the_documented_command_measures_in_a_fresh_clone(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "benchmarking.md").read_text(encoding="utf-8")
    (line,) = (line.strip() for line in page.splitlines() if "--contender" in line and line.startswith("python -m lab"))
    clone, work = tmp_path / "clone", tmp_path / "work"
    cloned = subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], capture_output=True, text=True, check=False)
    if cloned.returncode:
        pytest.skip(f"this checkout cannot be cloned: {cloned.stderr.strip()}")
    (clone / "toy.py").write_text(TOY)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = line.replace("WORK", shlex.quote(str(work))).replace("MODULE:FUNCTION", "toy:toy")

    def run() -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, shell=True, cwd=clone, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    done = run()
    assert (clone / "calls").read_text() == "xxxx"  # a warm-up and three rounds
    assert "| toy:toy | 7002 (7001 to 7003) |" in done.stdout
    commit = subprocess.run(["git", "-C", str(clone), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert f"; commit {commit.stdout[:10]}; " in done.stdout.splitlines()[0]
    written = json.loads((work / "results" / "decode_peers.json").read_text())
    assert written["rounds"] == {"toy:toy": {"toys/s": [7001.0, 7002.0, 7003.0]}}
    for name in json.loads((RESULTS / "decode_peers.json").read_text())["rounds"]:
        assert name not in done.stdout, "the committed figures are printed"
    changed = subprocess.run(["git", "-C", str(clone), "status", "--short"], capture_output=True, text=True, check=True)
    assert changed.stdout.split() == ["??", "calls", "??", "toy.py"]

    again = run()
    assert (clone / "calls").read_text() == "xxxx"
    assert "goes on with" in again.stderr
    assert "3 of 3 rounds are there" in again.stderr
    assert again.stdout.splitlines()[1:] == done.stdout.splitlines()[1:]
    with (clone / "lab" / "rounds.py").open("a") as file:
        file.write("# other code\n")
    third = run()
    assert (clone / "calls").read_text() == "x" * 8
    assert "starts anew" in third.stderr
    assert "other code measured it" in third.stderr
    assert "with changes" in third.stdout.splitlines()[0]
