"""Tests what the front door offers beside commands: --version, shell completion, an example in each --help."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from command_line import Run, assert_one_line_error

from nvlm_trt.cli import app

PROGRAM = Path(sys.executable).parent / "nvlm-trt"


def commands(group: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path and the command of everything that can be run."""
    for name, command in group.commands.items():
        if not hasattr(command, "commands"):
            yield (*path, name), command
            continue
        if command.invoke_without_command:
            yield (*path, name), command
        yield from commands(command, *path, name)


COMMANDS = dict(commands(typer.main.get_command(app)))


def test_the_version(run_cli: Run) -> None:
    status, out, err = run_cli("--version")
    assert (status, err) == (0, "")
    assert re.fullmatch(r"nvlm-trt \d+\.\d+\.\d+\S*\n", out)


def test_commands_are_all_found() -> None:
    assert {path[0] for path in COMMANDS} >= {"inspect", "build", "verify", "ask", "serve", "plan", "doctor", "bench"}
    assert ("bench", "compare") in COMMANDS


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_help_has_an_example_with_options_that_exist(run_cli: Run, path: tuple[str, ...]) -> None:
    status, out, _ = run_cli(*path, "--help")
    assert status == 0
    text = " ".join(out.split())
    match = re.search(rf"Example: (nvlm-trt {' '.join(path)} .*?)(?= Arguments| Options|$)", text)
    assert match, text
    used = set(re.findall(r"(?<= )--[a-z][a-z0-9-]*", match[1]))
    known = {option for parameter in COMMANDS[path].params for option in parameter.opts}
    assert used <= known


class TestCompletion:
    """The program is the installed one: the script calls it by its name."""

    def call(self, *command: str, **variables: str) -> str:
        environment = {**os.environ, **variables, "PATH": f"{PROGRAM.parent}{os.pathsep}{os.environ['PATH']}"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ("nvlm-trt in", ["init-checkpoint", "inspect"]),
            ("nvlm-trt build --lo", ["--lora"]),
            ("nvlm-trt bench com", ["compare"]),
        ],
    )
    def test_in_bash(self, tmp_path: Path, words: str, expected: list[str]) -> None:
        script = tmp_path / "completion.sh"
        script.write_text(self.call("nvlm-trt", _NVLM_TRT_COMPLETE="source_bash"))
        typed = words.split()
        line = f"source {script}; COMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}; _nvlm_trt_completion nvlm-trt; "
        assert self.call("bash", "-c", f'{line} echo "${{COMPREPLY[@]}}"').split() == expected

    @pytest.mark.parametrize("shell", ["zsh", "fish"])
    def test_scripts_of_other_shells(self, shell: str) -> None:
        assert f"complete_{shell}" in self.call("nvlm-trt", _NVLM_TRT_COMPLETE=f"source_{shell}")

    def test_the_options_that_install_it(self, run_cli: Run) -> None:
        _, out, _ = run_cli("--help")
        assert "--install-completion" in out
        assert "--show-completion" in out


@pytest.mark.parametrize("where", [("--engine", "nowhere"), ("--url", "grpc://127.0.0.1:9"), ()])
def test_video_is_refused_with_the_reason(run_cli: Run, where: tuple[str, ...]) -> None:
    result = run_cli("ask", "What happens?", "--video", "clip.mp4", *where)
    assert_one_line_error(result, "clip.mp4", "trained on still images, never on the frames of a video", "--image")
