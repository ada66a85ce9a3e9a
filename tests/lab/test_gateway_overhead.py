"""A short run of lab.gateway_overhead: both ways answer a real tritonserver's questions alike, and are measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab import gateway_overhead
from lab.gateway_overhead import GRPC, HTTP, REPEATED, TEXT, THROUGHPUT
from lab.origin import Origin
from lab.rounds import Rounds

SHORT = "--preset nvlm-d-tiny --precision fp32 --rounds 2 --requests 3 --concurrency 2 --output-tokens 4 --repeats 1"


def test_both_ways_are_measured(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = gateway_overhead.options().parse_args(["--work", str(tmp_path), "--threads", "1", *SHORT.split()])
    written = tmp_path / "run.json"
    gateway_overhead.measure(arguments, Rounds(written, Origin.here({}, gateway_overhead.PACKAGES)))
    rounds = json.loads(written.read_text())["rounds"]
    assert set(rounds) == {GRPC, HTTP}
    for metrics in rounds.values():
        assert set(metrics) == {THROUGHPUT, TEXT, REPEATED}
        assert all(value > 0 for values in metrics.values() for value in values)
        assert {len(values) for values in metrics.values()} == {2}
    assert f"{THROUGHPUT}: {HTTP} / {GRPC} = " in capfd.readouterr().out
