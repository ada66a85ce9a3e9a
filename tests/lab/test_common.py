"""The course of a benchmark: contenders by name, committed files, and code from elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lab.common import RESULTS, contender, parser, run
from lab.engines import engines_folder
from lab.origin import require_own_package
from lab.rounds import Rounds
from nvlm_trt.errors import EngineError, NvlmError


def never(arguments: object, rounds: Rounds) -> None:
    raise AssertionError("nothing is measured")


def called(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["lab/toy.py", *map(str, words)])
    run(parser("doc", rounds=1), never, "decode_peers.json", ("numpy",))


def test_a_committed_file_is_written_by_publish_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is a committed file; --publish writes it"):
        called(monkeypatch, "--work", tmp_path, "--json", RESULTS / "decode_peers.json")


def test_publish_takes_no_foreign_contender(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        called(monkeypatch, "--work", tmp_path, "--publish", "--contender", "time:time")
    assert "leave out --contender" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["absent_module:f", "time:absent", "time", ":f"])
def test_an_absent_contender_is_one_line(name: str) -> None:
    with pytest.raises(NvlmError, match=f"--contender {name}: "):
        contender(name)


def test_another_nvlm_trt_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_own_package()
    (tmp_path / "nvlm_trt").mkdir()
    (tmp_path / "nvlm_trt" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nvlm_trt")
    with pytest.raises(NvlmError, match="not from this checkout"):
        require_own_package()


def test_engines_of_other_code_are_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = engines_folder(tmp_path)
    (folder / "engine").mkdir()
    assert engines_folder(tmp_path) == folder
    assert (folder / "engine").exists()
    (folder / "origin.json").write_text('{"sources": "other"}')
    assert engines_folder(tmp_path) == folder
    assert not (folder / "engine").exists()
    assert "other code, another machine or other versions built it" in capsys.readouterr().err
    (folder / "origin.json").unlink()
    with pytest.raises(EngineError, match="was not made by lab"):
        engines_folder(tmp_path)
