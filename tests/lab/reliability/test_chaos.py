"""Brings three real kinds about, and sees what planted kinds leave behind."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.reliability import chaos
from lab.reliability.kind import Check, Kind
from lab.reliability.kinds.all_kinds import all_kinds
from lab.reliability.place import Place
from lab.reliability.promise import BrokenPromise, NotHere
from nvlm_trt.errors import NvlmError

Directories = Callable[[str], Path]
PRESET = "nvlm-d-tiny"
REAL = (
    "tritonserver killed",
    "TMPDIR with letters that are not ASCII",
    "a build whose files may not exceed 1 MiB",
)


@pytest.fixture
def run(engine: Directories, checkpoint: Directories, tmp_path: Path) -> Callable[[Kind], chaos.Row]:
    return lambda kind: chaos.run_kind(kind, lambda: Place(tmp_path / "place", engine(PRESET), checkpoint(PRESET)))


@pytest.mark.parametrize("name", REAL)
def test_the_promise_of_a_kind_holds(name: str, run: Callable[[Kind], chaos.Row]) -> None:
    row = run(all_kinds()[name])
    assert (row["held"], row["seen"]) == (chaos.HELD, "")


def leaving(script: str, *words: str) -> Check:
    """Makes a check whose command runs `script` beside itself and ends."""

    def check(place: Place) -> None:
        served = place.start(arguments=("--help",), wrapper=("sh", "-c", f'{script}; exec "$@"', *(words or ("sh",))))
        assert served.end() == 0

    return check


@pytest.mark.parametrize(
    ("script", "seen"),
    [
        ("sleep 100 & true", "left behind: process "),
        ('touch "$TMPDIR/nvlm-trt-planted"', "left behind: file nvlm-trt-planted in TMPDIR"),
        ("true", ""),
    ],
)
def test_what_is_left_behind_is_seen(
    script: str, seen: str, run: Callable[[Kind], chaos.Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lab.reliability.served.GONE_SECONDS", 1.0)
    row = run(Kind("planted", "nothing is left", leaving(script)))
    assert row["held"] == (chaos.BROKEN if seen else chaos.HELD)
    assert seen in row["seen"]


def test_shared_memory_left_behind_is_seen(run: Callable[[Kind], chaos.Row], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.reliability.served.GONE_SECONDS", 1.0)
    prefix = f"planted_{secrets.token_hex(4)}_"
    check = leaving(f"touch /dev/shm/{prefix}1; sleep 1", f"shm-region-prefix-name={prefix}")
    row = run(Kind("planted", "nothing is left", check))
    assert row["seen"] == f"left behind: shared memory {prefix}1"
    assert not Path(f"/dev/shm/{prefix}1").exists()  # the run itself tidies up


@pytest.mark.parametrize(
    ("error", "held"),
    [(BrokenPromise("no"), chaos.BROKEN), (NotHere("no"), chaos.NOT_HERE), (ZeroDivisionError("no"), chaos.BROKEN)],
)
def test_an_exception_is_a_row(error: Exception, held: str, run: Callable[[Kind], chaos.Row]) -> None:
    def check(place: Place) -> None:
        raise error

    row = run(Kind("planted", "promise", check))
    assert row["held"] == held
    assert row["seen"].endswith("no")


def test_kinds_are_many_chosen_by_name_and_kept_in_order() -> None:
    kinds = all_kinds()
    assert len(kinds) >= 60
    assert [each.name for each in chaos.chosen(kinds, ["a port in use"])] == ["a port in use"]
    with pytest.raises(NvlmError, match="--only 'absent' is no kind"):
        chaos.chosen(kinds, ["absent"])
    rows = [{"kind": name} for name in ("c", "gone", "a")]
    assert [row["kind"] for row in chaos.in_order(rows, ["a", "b", "c"])] == ["a", "c"]


def test_the_table_escapes_what_markdown_reads() -> None:
    row = {"kind": "a|b", "promise": "p", "held": "no", "seen": "<x>", "seconds": 1.2}
    assert chaos.table([row])[-1] == "| a\\|b | p | no: &lt;x> | 1 |"
