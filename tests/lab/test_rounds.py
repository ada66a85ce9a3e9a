"""Rounds are interleaved, written after every measurement, and resumed by a run of the same origin only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab.origin import Origin
from lab.rounds import Rounds
from lab.spread import Spread
from nvlm_trt.errors import NvlmError

HERE = Origin(
    machine={"id": "0", "processor": "P", "cores": 2, "memory_gb": 8.0, "system": "S", "python": "3.11.7", "load": 0.1},
    code={"commit": "1234567890abcdef"},
    versions={"numpy": "1.26.4"},
    settings={"steps": 1},
)
Log = list[str]


def counting(name: str, log: Log, step: float = 1.0) -> Callable[[], Mapping[str, float]]:
    """Makes a contender whose n-th call, from 0, measures n * step."""

    def measure() -> Mapping[str, float]:
        log.append(name)
        return {"ms": (log.count(name) - 1) * step}

    return measure


def in_turn(values: Iterable[float]) -> Callable[[], Mapping[str, float]]:
    left = iter(values)
    return lambda: {"ms": next(left)}


def both(log: Log, step: float = 1.0) -> dict[str, Callable[[], Mapping[str, float]]]:
    return {name: counting(name, log, step) for name in "ab"}


@pytest.fixture
def earlier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The file of a run that stopped after two rounds of a and b."""
    path = tmp_path / "results.json"
    Rounds(path, HERE).run(both([]), 2)
    capsys.readouterr()
    return path


def starts_anew(path: Path, origin: Origin, capsys: pytest.CaptureFixture[str]) -> str:
    """Runs two rounds, checks that none is an earlier one and that the earlier file is kept; returns the line why."""
    before = path.read_bytes()
    log: Log = []
    rounds = Rounds(path, origin)
    rounds.run(both(log, 10), 2)
    assert log == ["a", "b"] * 3
    assert rounds.values == {"a": {"ms": [10, 20]}, "b": {"ms": [10, 20]}}
    assert json.loads(path.read_text())["rounds"] == rounds.values
    assert path.with_name("results.1.json").read_bytes() == before
    first, *others = capsys.readouterr().err.splitlines()
    assert all(line.startswith(("warm-up", "round")) for line in others)
    start = f"starts anew, {path} is now results.1.json: "
    assert first.startswith(start)
    return first.removeprefix(start)


def test_contenders_take_turns_and_the_warm_up_is_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log: Log = []
    rounds = Rounds(tmp_path / "a.json", HERE)
    rounds.run(both(log), 2)
    assert log == ["a", "b"] * 3
    assert rounds.values == {"a": {"ms": [1, 2]}, "b": {"ms": [1, 2]}}
    assert "goes on" not in capsys.readouterr().err


def test_goes_on(earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(earlier.read_text())
    log: Log = []
    rounds = Rounds(earlier, replace(HERE, machine={**HERE.machine, "load": 3.0}))
    rounds.run(both(log, 10), 3)
    assert log == ["a", "b", "a", "b"]  # a warm-up, round 3
    assert rounds.values == {"a": {"ms": [1, 2, 10]}, "b": {"ms": [1, 2, 10]}}
    line = capsys.readouterr().err.splitlines()[0]
    assert line == f"goes on with {earlier}: 2 of 3 rounds are there, from {record['measured']['first']} on"
    log.clear()
    Rounds(earlier, HERE).run(both(log), 3)
    assert log == []
    assert list(earlier.parent.iterdir()) == [earlier]


def test_an_interrupted_round_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log: Log = []
    path = tmp_path / "a.json"

    def interrupted() -> Mapping[str, float]:
        if log.count("b") == 2:
            raise KeyboardInterrupt
        return counting("b", log)()

    with pytest.raises(KeyboardInterrupt):
        Rounds(path, HERE).run({"a": counting("a", log), "b": interrupted}, 3)
    assert json.loads(path.read_text())["rounds"] == {"a": {"ms": [1, 2]}, "b": {"ms": [1]}}
    capsys.readouterr()

    log.clear()
    rounds = Rounds(path, HERE)
    rounds.run(both(log, 10), 3)
    assert log == ["a", "b", "b", "a", "b"]  # a warm-up, the rest of round 2, round 3
    assert rounds.values == {"a": {"ms": [1, 2, 10]}, "b": {"ms": [1, 10, 20]}}
    assert "1 of 3 rounds are there" in capsys.readouterr().err.splitlines()[0]


@pytest.mark.parametrize(("fact", "value"), [("id", "1"), ("processor", "Q"), ("cores", 4), ("system", "T")])
def test_another_machine_starts_anew(
    earlier: Path, fact: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    origin = replace(HERE, machine={**HERE.machine, fact: value})
    assert starts_anew(earlier, origin, capsys).startswith(f"another machine measured it ({fact}: ")


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ({"commit": "fedcba0987654321"}, "commit fedcba0987 here"),
        ({"commit": "1234567890abcdef", "changes": "00112233445566"}, "commit 1234567890 with changes 0011223344 here"),
        ({"sources": "00112233445566"}, "sources 0011223344 here"),
    ],
)
def test_other_code_starts_anew(
    earlier: Path, code: dict[str, str], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = starts_anew(earlier, replace(HERE, code=code), capsys)
    assert reason == f"other code measured it (commit 1234567890 there, {shown})"


def test_other_versions_start_anew(earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reason = starts_anew(earlier, replace(HERE, versions={"numpy": "2.0.0"}), capsys)
    assert reason == "it has other versions (numpy: 1.26.4 there, 2.0.0 here)"


def test_versions_outside_of_the_environment_count(earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounds = Rounds(earlier, HERE)
    rounds.add_versions({"OpenVINO int8": "openvino 2026.4"})
    rounds.run(both([]), 2)
    assert "other versions (OpenVINO int8: None there, openvino 2026.4 here)" in capsys.readouterr().err
    assert json.loads(earlier.read_text())["versions"] == {"numpy": "1.26.4", "OpenVINO int8": "openvino 2026.4"}


def test_other_settings_start_anew(earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reason = starts_anew(earlier, replace(HERE, settings={"steps": 2}), capsys)
    assert reason == "it has other settings (steps: 1 there, 2 here)"


def test_other_contenders_start_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    Rounds(path, HERE).run({"a": counting("a", [])}, 2)
    capsys.readouterr()
    assert starts_anew(path, HERE, capsys) == "it has other contenders (b)"


def damaged(record: dict[str, Any]) -> list[str]:
    """Texts that no run writes."""
    lacking = [{key: value for key, value in record.items() if key != missing} for missing in record]
    other: list[Any] = [[], {"a": 1, "b": {}}, {"a": {"ms": [1.0, 2.0], "s": [1.0]}, "b": {}}, {"a": {"ms": ["1"]}}]
    wrong = [record | {"rounds": rounds} for rounds in other]
    needed = ("code", "machine", "versions", "settings", "measured", "rounds")
    cut = [json.dumps(part) for part in lacking if not set(needed) <= set(part)]
    return ["", "{", "[]", "\x00", json.dumps(record)[:-40], *cut, *map(json.dumps, wrong)]


def test_a_damaged_file_starts_anew(earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = damaged(json.loads(earlier.read_text()))
    assert len(texts) == 15
    for text in texts:
        earlier.write_text(text)
        assert starts_anew(earlier, HERE, capsys).startswith("it is damaged"), text
        earlier.with_name("results.1.json").unlink()
    earlier.write_bytes(b"\xff\xfe")
    assert starts_anew(earlier, HERE, capsys).startswith("it is damaged")


def test_every_older_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for steps in range(4):
        Rounds(path, replace(HERE, settings={"steps": steps})).run({"a": lambda: {"ms": 1.0}}, 1)
    found = {file.name: json.loads(file.read_text())["settings"]["steps"] for file in tmp_path.iterdir()}
    assert found == {"a.1.json": 0, "a.2.json": 1, "a.3.json": 2, "a.json": 3}


def test_ratio_best_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounds = Rounds(tmp_path / "a.json", HERE)
    measured = {"ours": [1, 2, 9], "theirs x": [4, 4, 6], "theirs y": [5, 5, 5]}
    rounds.run({name: in_turn(values) for name, values in measured.items()}, 3, warm_up=False)
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


def test_a_table_says_when_where_and_with_which_code(earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(earlier.read_text())
    record["measured"] = {"first": "2026-01-02 03:04 UTC", "last": "2026-01-02 05:06 UTC"}
    earlier.write_text(json.dumps(record))
    rounds = Rounds(earlier, HERE)
    rounds.run(both([]), 2)
    rounds.report()
    assert capsys.readouterr().out.splitlines()[0] == (
        "Measured 2026-01-02 03:04 UTC to 2026-01-02 05:06 UTC on P, 2 cores, 8.0 GB, S; commit 1234567890; "
        "Python 3.11.7, numpy 1.26.4"
    )


def test_only_a_complete_run_is_published(tmp_path: Path) -> None:
    target = tmp_path / "committed" / "a.json"
    rounds = Rounds(tmp_path / "a.json", HERE)
    with pytest.raises(NvlmError, match="not written: some contenders have fewer than 1 rounds"):
        rounds.publish(target)
    with pytest.raises(ZeroDivisionError):
        rounds.run({"a": lambda: {"ms": 1.0}, "b": lambda: {"ms": 1 / 0}}, 1, warm_up=False)
    with pytest.raises(NvlmError, match="fewer than 1 rounds"):
        rounds.publish(target)
    rounds.run({"a": lambda: {"ms": 1.0}, "b": lambda: {"ms": 2.0}}, 1)
    rounds.report(skipped=["c skipped: it is not installed"])
    with pytest.raises(NvlmError, match="c skipped"):
        rounds.publish(target)
    assert not target.exists()
    rounds.report()
    rounds.publish(target)
    assert target.read_bytes() == (tmp_path / "a.json").read_bytes()
