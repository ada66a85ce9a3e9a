"""Temporary folders of running processes are not taken for abandoned ones, whatever happens between two steps."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from nvlm_trt import owned_folder
from nvlm_trt.owned_folder import abandoned, make_owned_folder


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
