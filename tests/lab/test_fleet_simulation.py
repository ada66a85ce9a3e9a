"""Short runs of lab.fleet_simulation and lab.engine_memory: both systems answer, and what they report is comparable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from lab import engine_memory, fleet_simulation
from lab.origin import Origin
from lab.rounds import Rounds

Directory = Callable[[str], Path]


def test_both_systems_answer_the_same_requests(tmp_path: Path, engine: Directory) -> None:
    short = "--requests 8 --tiles 1 --text-tokens 8 --output-tokens 4 --loads 0.5 --threads 1 --faster 200"
    words = ["--work", str(tmp_path), "--engine", str(engine("nvlm-d-tiny")), *short.split()]
    written = tmp_path / "results" / fleet_simulation.RESULT
    fleet_simulation.measure(fleet_simulation.options().parse_args(words), Rounds(written, Origin.here({})))
    run = json.loads(written.read_text())
    assert set(run["rounds"]) == {"sleeping, load 0.5", "nvlm-d-tiny, load 0.5"}
    for metrics in run["rounds"].values():
        assert {"TTFT p90 ms", "TTFT p90 simulated", "token mean ms", "end to end p50 simulated"} <= set(metrics)
        assert all(value > 0 for values in metrics.values() for value in values)
    assert (tmp_path / fleet_simulation.STEP_TIMES).exists()


def test_memory_of_an_engine(tmp_path: Path, engine: Directory) -> None:
    """The caches are most of a tiny engine's memory: they are held, and only once."""
    words = ["--work", str(tmp_path), "--engines", str(engine("nvlm-x-tiny"))]
    written = tmp_path / "results" / engine_memory.RESULT
    engine_memory.measure(engine_memory.options().parse_args(words), Rounds(written, Origin.here({})))
    (metrics,) = json.loads(written.read_text())["rounds"].values()
    (held,), (planned,) = metrics[engine_memory.HELD], metrics[engine_memory.PLANNED]
    assert held > 100
    assert 0.6 < planned / held < 1.7
