"""Temporary folders of running processes are not taken for abandoned ones, whatever happens between two steps."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from nvlm_trt import owned_folder
from nvlm_trt.owned_folder import abandoned, make_owned_folder, take_folder


def test_a_folder_made_anew_under_the_name_of_a_removed_one_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process removes the abandoned folder, and an owner takes its name, before this one has the lock."""
    folder = tmp_path / "folder"
    folder.mkdir()
    real = fcntl.flock

    def lock(descriptor: int, operation: int) -> None:
        folder.rmdir()
        folder.mkdir()
        real(descriptor, operation)

    assert list(abandoned([folder])) == [folder]
    monkeypatch.setattr(owned_folder.fcntl, "flock", lock)
    assert list(abandoned([folder])) == []


def test_a_folder_that_is_removed_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, removed = os.open, []

    def open_later(path: Path, flags: int) -> int:
        if not removed:
            removed.append(path)
            os.rmdir(path)
        return real(path, flags)

    monkeypatch.setattr(owned_folder.os, "open", open_later)
    os.close(make_owned_folder(tmp_path / "folder"))
    assert removed
    assert (tmp_path / "folder").is_dir()


def test_a_folder_is_taken_over_when_its_owner_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    first = take_folder(folder)
    assert first is not None
    assert take_folder(folder) is None
    os.close(first)  # as when a process ends, however it ends
    (folder / "left").touch()
    second = take_folder(folder)
    assert second is not None
    assert (folder / "left").exists()
    os.close(second)


def test_without_locks_only_a_new_folder_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.EBADF, "as over NFS")

    monkeypatch.setattr(owned_folder.fcntl, "flock", no_locks)
    first = take_folder(tmp_path / "folder")
    assert first is not None
    os.close(first)
    assert take_folder(tmp_path / "folder") is None


def test_a_folder_that_its_owner_removes_meanwhile_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = tmp_path / "folder", os.open
    folder.mkdir()

    def open_later(path: Path, flags: int) -> int:
        monkeypatch.undo()
        folder.rmdir()
        return real(path, flags)

    monkeypatch.setattr(owned_folder.os, "open", open_later)
    owner = take_folder(folder)
    assert owner is not None
    assert folder.is_dir()
    os.close(owner)


def test_an_interrupt_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int, operation: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(owned_folder.fcntl, "flock", interrupted)
    with pytest.raises(KeyboardInterrupt):
        take_folder(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []
