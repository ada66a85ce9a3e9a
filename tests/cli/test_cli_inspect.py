"""Tests `nvlm-trt inspect`: a table or one JSON object, commands that follow, exit status 1 for a fault."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Run, assert_one_line_error
from sparse_checkpoint import write_sparse_checkpoint

from nvlm_trt.model.presets import PRESETS

Directory = Callable[[str], Path]


def test_the_next_commands_work(
    run_cli: Run, checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run_cli("inspect", checkpoint("nvlm-x-tiny"), "--json")
    assert (status, err) == (0, "")
    steps = [shlex.split(step) for step in json.loads(out)["next"]]
    assert [step[1] for step in steps] == ["plan", "build", "verify"]
    for step in steps:
        assert run_cli(*step[1:])[0] == 0


def test_a_table(run_cli: Run, checkpoint: Directory) -> None:
    status, out, _ = run_cli("inspect", checkpoint("nvlm-h-tiny"))
    assert status == 0
    assert "NVLM-H, 4 vision layers of 128, 6 qwen2 layers of 192, 3 cross-attention, vocabulary 512" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert rows["cross_attention"][1:] == ["33", "1.18", "M", "2.36", "MB", "BF16"]
    assert "next: nvlm-trt build --checkpoint" in out


def test_broken_files_are_named_with_what_fetches_them(run_cli: Run, tmp_path: Path) -> None:
    directory = tmp_path / "models--nvidia--NVLM-D-72B" / "snapshots" / "main"
    directory.parent.mkdir(parents=True)
    write_sparse_checkpoint(directory, PRESETS["nvlm-d-72b"], shards=46)
    (directory / "model-00007-of-00046.safetensors").unlink()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123\n"
    (directory / "model-00009-of-00046.safetensors").write_text(pointer)
    status, out, _ = run_cli("inspect", directory)
    assert status == 1
    assert "weight files: 44 of 46 whole" in out
    assert "next: hf download nvidia/NVLM-D-72B model-00007-of-00046.safetensors\n" in out
    assert f"next: git -C {directory} lfs pull\n" in out
    assert "nvlm-trt build" not in out


def test_mistakes(run_cli: Run, tmp_path: Path) -> None:
    assert_one_line_error(run_cli("inspect", tmp_path / "nowhere"), "nowhere", "not a folder")
    assert_one_line_error(run_cli("inspect"), "argument 'checkpoint'")
