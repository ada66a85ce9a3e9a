"""The parts of lab.build_at_size, on a tiny model: dropped data takes no disk, and all parts count the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab import build_at_size
from lab.build_at_size import HASHING, MEMORY, RATE, SECONDS, building, writing
from lab.build_memory import write_calibration, write_sparse_checkpoint
from lab.origin import Origin
from lab.rounds import Rounds
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.engine import CALIBRATION
from nvlm_trt.model.presets import PRESETS


def test_all_parts_measure_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "few"
    write_sparse_checkpoint(checkpoint, PRESETS["nvlm-d-tiny"], shards=7)
    with Checkpoint.open(checkpoint) as opened:
        assert len(opened.stamp) == 7
    write_calibration(tmp_path / f"few-{CALIBRATION}", checkpoint)
    rounds = Rounds(tmp_path / "rounds.json", Origin({}, {}, {}, {}))
    built, converted = (building(checkpoint, "int8-weight-only", drop=drop)() for drop in (False, True))
    rounds.values["build"] = {"GB": [built["GB"]]}
    monkeypatch.setattr(build_at_size, "BLOCK", 1 << 16)
    written = writing(tmp_path, rounds, "build")()
    assert built["GB"] == converted["GB"] == pytest.approx(written["GB"], abs=1e-9)
    assert built["GB"] > 0.001
    for measured in (built, converted):
        assert 0 < measured[HASHING] < measured[SECONDS]
        assert 0 < measured[MEMORY] < 1000
        assert measured[RATE] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"few", f"few-{CALIBRATION}"}
