"""Tests the folder for temporary files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from nvlm_trt.errors import EngineError
from nvlm_trt.temporary import temporary_folder


def test_the_folder_is_that_of_tempfile() -> None:
    assert temporary_folder() == Path(tempfile.gettempdir())


def test_no_folder_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "absent")])
    with pytest.raises(EngineError, match="set TMPDIR"):
        temporary_folder()
