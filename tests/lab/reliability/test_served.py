"""Fuzzes and soaks a real server for a short time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.reliability import soak
from lab.reliability.question import questions
from lab.reliability.request_fuzz import RequestCounts, RequestFuzz
from lab.reliability.soak_course import SoakCourse
from lab.reliability.target import ServedTarget


@pytest.fixture(scope="module")
def target(engine: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedTarget]:
    with ServedTarget(engine("nvlm-h-tiny"), tmp_path_factory.mktemp("served")) as running:
        yield running
        assert running.served.stop() == 0
        assert running.served.traces.left(20) == []


def test_odd_requests_are_answered_or_refused(target: ServedTarget) -> None:
    counts = RequestCounts()
    blocks = RequestFuzz(1, counts, target).run(160, 40, time.monotonic() + 60)
    assert [finding.line for block in blocks for finding in block] == []
    assert counts.done >= 40
    assert min(counts.answered, counts.refused, counts.tritons_refusals) >= 5
    assert target.is_alive()


def test_full_load_changes_no_answer(target: ServedTarget) -> None:
    wire = target.wire()
    course = SoakCourse(soak.asking(wire), questions(1), target.roles, target.kept, concurrency=8)
    stretch = course.run(10, target.is_alive, lambda told: None)
    wire.close()
    assert (stretch.errors, stretch.differing, stretch.lines) == (0, 0, [])
    assert sum(stretch.requests.values()) > 20
    assert set(stretch.growth_mb) >= {"serve", "guard", "tritonserver", "nvlm_0_0", "tiling_0_0"}
