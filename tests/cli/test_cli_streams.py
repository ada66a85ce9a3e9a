"""A standard output that is full or closed is one line on standard error; a reader that has left is no error."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Directory = Callable[[str], Path]
IMAGE = Path(__file__).parents[2] / "docs" / "images" / "receipt.png"
CLI = [sys.executable, "-m", "nvlm_trt.cli"]
PLAN = ["plan", "--preset", "nvlm-d-tiny"]


@pytest.fixture(scope="module")
def commands(
    engine: Directory, checkpoint: Directory, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """Commands that print to standard output."""
    folder = tmp_path_factory.mktemp("streams")
    model, weights = str(engine("nvlm-d-tiny")), str(checkpoint("nvlm-d-tiny"))
    samples = folder / "samples.jsonl"
    samples.write_text('{"prompt": "Hello", "answer": "x"}\n')
    asking = ["ask", "hello", "--engine", model, "--max-tokens", "4"]
    return {
        "help": ["--help"],
        "help of a command": ["build", "--help"],
        "plan": PLAN,
        "plan --json": [*PLAN, "--json"],
        "ask": asking,
        "ask --json": [*asking, "--json"],
        "verify": ["verify", model, "--checkpoint", weights, "--tokens", "1"],
        "eval": ["eval", "--engine", model, "--samples", str(samples), "--max-tokens", "1"],
        "eval --json": ["eval", "--engine", model, "--samples", str(samples), "--max-tokens", "1", "--json"],
        "tiles --json": ["tiles", str(IMAGE), "--output", str(folder / "tiles.png"), "--overwrite", "--json"],
    }


KINDS = ["help", "help of a command", "plan", "plan --json", "ask", "ask --json", "verify", "eval", "eval --json"]
KINDS += ["tiles --json"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_output_is_one_line(commands: dict[str, list[str]], kind: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*CLI, *commands[kind]], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: cannot write to standard output (No space left on device); ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", ["help", "plan", "plan --json", "ask"])
def test_a_closed_output_is_one_line(commands: dict[str, list[str]], kind: str) -> None:
    done = shell('exec "$@" >&-', *commands[kind])
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write to standard output (it is closed); ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", ["help", "plan", "plan --json", "ask", "eval"])
def test_a_reader_that_has_left_is_no_error(commands: dict[str, list[str]], kind: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*CLI, *commands[kind]], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode == 141, done.stderr  # as of a program that SIGPIPE ends
    assert "error" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_command_that_prints_nothing_does_not_mind(tmp_path: Path) -> None:
    done = shell('exec "$@" >&-', "init-checkpoint", "--preset", "nvlm-d-tiny", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path, closed: str, checkpoint: Directory) -> None:
    """Messages written to it would end in an engine."""
    command = ["build", "--checkpoint", str(checkpoint("nvlm-d-tiny")), "--output", str(tmp_path / "engine")]
    assert shell(f'exec "$@" {closed}', *command).returncode == 0
    check = [sys.executable, "-c", "import sys; from nvlm_trt.engine import Engine; Engine.open(sys.argv[1], True)"]
    subprocess.run([*check, str(tmp_path / "engine")], check=True)


@pytest.mark.parametrize("streams", ["2>&-", "2>/dev/full", ">&- 2>&-", ">/dev/full 2>/dev/full"])
def test_an_error_without_a_place_to_print_it_still_has_its_status(streams: str) -> None:
    assert shell(f'exec "$@" {streams}', *PLAN, "--text-tokens", "0").returncode == 2
    if ">" in streams.replace("2>", ""):
        assert shell(f'exec "$@" {streams}', *PLAN).returncode == 2


def test_debug_shows_where(commands: dict[str, list[str]]) -> None:
    """An output that is full is no defect: its line is all there is to say."""
    with open("/dev/full", "w") as full:
        done = subprocess.run([*CLI, "--debug", *PLAN], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def shell(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", script, "bash", *CLI, *arguments], capture_output=True, text=True, check=False)
