"""The folder of unfinished work: kept by an error, removed at the end, and of one process at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nvlm_trt.errors import EngineError
from nvlm_trt.kept_folder import kept_folder

KEY, OTHER = "0123456789abcdef" * 4, "f" * 64


def leave(subject: Path, key: str) -> Path:
    """Leave a folder with a file in it, as work does that an error ends."""
    with pytest.raises(ZeroDivisionError), kept_folder(subject, "work", key) as folder:
        (folder / "finished").touch()
        raise ZeroDivisionError
    return folder


def test_what_an_error_left_is_there_the_next_time_and_removed_at_the_end(tmp_path: Path) -> None:
    left = leave(tmp_path / "engine", KEY)
    assert left.parent == tmp_path
    with kept_folder(tmp_path / "engine", "work", KEY) as folder:
        assert folder == left
        assert (folder / "finished").exists()
    assert list(tmp_path.iterdir()) == []


def test_work_of_another_key_begins_anew_and_removes_what_is_of_no_use(tmp_path: Path) -> None:
    left, of_another = leave(tmp_path / "engine", KEY), leave(tmp_path / "engine2", KEY)
    with kept_folder(tmp_path / "engine", "work", OTHER) as folder:
        assert list(folder.iterdir()) == []
        assert not left.exists()
    assert list(tmp_path.iterdir()) == [of_another]


HOLD = """
import sys
from pathlib import Path
from nvlm_trt.kept_folder import kept_folder
with kept_folder(Path(sys.argv[1]), "work", sys.argv[2]) as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_share_a_folder_nor_remove_each_others(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "engine"), KEY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        held = Path(other.stdout.readline().strip())
        with (
            pytest.raises(EngineError, match="another process does the work of"),
            kept_folder(tmp_path / "engine", "work", KEY),
        ):
            pass
        with kept_folder(tmp_path / "engine", "work", OTHER):
            assert held.is_dir()
        other.kill()
    assert held.is_dir()
    with kept_folder(tmp_path / "engine", "work", KEY) as folder:
        assert folder == held


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    left = leave(tmp_path / "engine", KEY)
    left.rename(tmp_path / "elsewhere")
    left.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match="cannot write"), kept_folder(tmp_path / "engine", "work", KEY):
        pass
    assert (tmp_path / "elsewhere" / "finished").exists()
