"""Tests that a run removes what a killed run has left beside the same target, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvlm_trt import staging
from nvlm_trt.staging import replace_directory, temporary_sibling

STAGE = """
import sys
from pathlib import Path
from nvlm_trt.staging import temporary_sibling
with temporary_sibling(Path(sys.argv[1])) as outer, temporary_sibling(outer) as inner:
    (outer / "file").touch()
    print("ready", flush=True)
    input()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has two temporary folders for `tmp_path / "out"`."""
    command = [sys.executable, "-c", STAGE, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_a_killed_process_left_is_removed(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    mine = {"..out.tmp-mine", ".outer.tmp-1-a", "out.tmp-1-a"}
    for name in mine:
        (tmp_path / name).mkdir()
    assert len(names(tmp_path) - mine) == 2
    other.kill()
    other.wait()
    with temporary_sibling(tmp_path / "out") as folder:
        assert names(tmp_path) == {folder.name, *mine}
    assert names(tmp_path) == mine


def test_the_folders_of_a_running_process_are_kept(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    theirs = names(tmp_path)
    with temporary_sibling(tmp_path / "out") as folder:
        assert names(tmp_path) == {folder.name, *theirs}
    other.communicate("\n")
    assert names(tmp_path) == set()


def test_a_target_that_a_killed_process_had_set_aside_is_put_back(tmp_path: Path) -> None:
    aside = tmp_path / ".out.tmp-1-abc"
    (aside / "previous").mkdir(parents=True)
    (aside / "previous" / "file").write_text("old")
    with temporary_sibling(tmp_path / "out"):
        assert (tmp_path / "out" / "file").read_text() == "old"
        assert not aside.exists()


def test_an_interrupt_between_the_renames_keeps_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, new = tmp_path / "out", tmp_path / "new"
    for folder in (target, new):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    rename = staging.os.rename

    def interrupted(source: Path, destination: Path) -> None:
        if source == new:
            raise KeyboardInterrupt
        rename(source, destination)

    monkeypatch.setattr(staging, "_exchange", lambda one, other: False)  # as on a file system that cannot
    monkeypatch.setattr(staging.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_directory(new, target, lambda: None, overwrite=True)
    assert (target / "file").read_text() == "out"
    assert names(tmp_path) == {"out", "new"}
