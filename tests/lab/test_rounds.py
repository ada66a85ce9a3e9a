"""Rounds are interleaved, kept after every measurement and gone on with; ratios and spreads are what they say."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from common import Rounds, Spread

from nvlm_trt.errors import NvlmError

Log = list[str]


def counting(name: str, log: Log, step: float = 1.0) -> Callable[[], Mapping[str, float]]:
    """Its n-th call, from 0, measures n * step."""

    def measure() -> Mapping[str, float]:
        log.append(name)
        return {"ms": (log.count(name) - 1) * step}

    return measure


def test_contenders_take_turns_and_the_warm_up_is_not_kept(tmp_path: Path) -> None:
    log: Log = []
    rounds = Rounds(tmp_path / "a.json", {})
    rounds.run({name: counting(name, log) for name in "ab"}, 2)
    assert log == ["a", "b"] * 3
    assert rounds.values == {"a": {"ms": [1, 2]}, "b": {"ms": [1, 2]}}


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    log: Log = []
    path = tmp_path / "a.json"

    def interrupted() -> Mapping[str, float]:
        if log.count("b") == 2:
            raise KeyboardInterrupt
        return counting("b", log)()

    with pytest.raises(KeyboardInterrupt):
        Rounds(path, {"steps": 1}).run({"a": counting("a", log), "b": interrupted}, 3)
    assert json.loads(path.read_text())["rounds"] == {"a": {"ms": [1, 2]}, "b": {"ms": [1]}}

    log.clear()
    rounds = Rounds(path, {"steps": 1})
    rounds.run({name: counting(name, log, 10) for name in "ab"}, 3)
    assert log == ["a", "b", "b", "a", "b"]  # a warm-up, the rest of round 2, round 3
    assert rounds.values == {"a": {"ms": [1, 2, 10]}, "b": {"ms": [1, 10, 20]}}

    log.clear()
    Rounds(path, {"steps": 1}).run({name: counting(name, log) for name in "ab"}, 3)
    assert log == []


def test_a_file_of_other_settings_or_contenders_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    Rounds(path, {"steps": 1}).run({"a": counting("a", [])}, 1)
    with pytest.raises(NvlmError, match="other settings"):
        Rounds(path, {"steps": 2})
    with pytest.raises(NvlmError, match="differs in b"):
        Rounds(path, {"steps": 1}).run({name: counting(name, []) for name in "ab"}, 1)


def test_ratio_best_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounds = Rounds(tmp_path / "a.json", {})
    rounds.values = {"ours": {"ms": [1, 2, 9]}, "theirs x": {"ms": [4, 4, 6]}, "theirs y": {"ms": [5, 5, 5]}}
    assert rounds.ratio("ms", "ours", "theirs x") == Spread(0.5, 0.25, 1.5)
    assert rounds.best("ms", "theirs", largest=False) == "theirs x"
    assert rounds.best("ms", "theirs", largest=True) == "theirs y"
    assert rounds.best("ms", "nobody", largest=True) is None
    rounds.report([("ms", "ours", "theirs x")], notes=["n"])
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["summary"]["ours"]["ms"] == {"median": 2, "lowest": 1, "highest": 9}
    assert written["ratios"] == [
        {"metric": "ms", "of": "ours", "to": "theirs x", "median": 0.5, "lowest": 0.25, "highest": 1.5}
    ]
    assert written["notes"] == ["n"]
    assert written["machine"]["cores"] >= 1
    out = capsys.readouterr().out
    assert "| ours | 2 (1 to 9) |" in out
    assert "ours / theirs x = 0.5 (0.25 to 1.5)" in out
