"""Comparisons of two runs, and files that cannot be compared."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from results import WORKLOAD, document, point, write

from nvlm_trt.benchmark.compare import compare
from nvlm_trt.benchmark.load import ClosedLoop, OpenLoop
from nvlm_trt.benchmark.slo import Slo
from nvlm_trt.benchmark.workload import Lengths
from nvlm_trt.errors import RequestError


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return write(tmp_path / "a.json", document(point(ClosedLoop(1)), point(ClosedLoop(2)), point(OpenLoop(0.5))))


def test_every_number_has_its_ratio(a: Path, tmp_path: Path) -> None:
    b = write(tmp_path / "b.json", document(point(ClosedLoop(2), slower=2.0), point(ClosedLoop(4))))
    comparison = compare(a, b)
    assert {row.load for row in comparison.rows} == {"2 at once"}, "loads that are in both"
    rows = {row.metric: row for row in comparison.rows}
    assert (rows["ttft_s.p50"].a, rows["ttft_s.p50"].b) == (1.0, 2.0)
    assert rows["ttft_s.p50"].ratio == pytest.approx(2.0)
    assert rows["output_tokens_per_s"].ratio == pytest.approx(0.5)
    assert {row.verdict for row in comparison.rows} == {"worse"}
    assert {row.verdict for row in compare(b, a).rows} == {"better"}
    assert {row.verdict for row in compare(a, a).rows} == {"equal"}
    assert json.loads(json.dumps(comparison.to_dict()))["rows"][0]["ratio"] == pytest.approx(2.0)


def test_different_workloads_are_an_error(a: Path, tmp_path: Path) -> None:
    workload = dataclasses.replace(WORKLOAD, output_tokens=Lengths(5, 9), seed=1)
    b = write(tmp_path / "b.json", document(point(ClosedLoop(1)), workload=workload))
    with pytest.raises(RequestError, match="different workloads") as raised:
        compare(a, b)
    assert "output_tokens '3' and '5:9'" in str(raised.value)
    assert "seed 0 and 1" in str(raised.value)
    assert "prompt_tokens" not in str(raised.value), "the message names only differences"


def test_no_load_in_common_is_an_error(a: Path, tmp_path: Path) -> None:
    cut = point(ClosedLoop(1), status="interrupted")  # its percentiles are of another number of requests
    b = write(tmp_path / "b.json", document(cut, point(ClosedLoop(3))))
    with pytest.raises(RequestError, match="no load in common.*1 at once.*3 at once"):
        compare(a, b)
    with pytest.raises(RequestError, match="no load in common.*none"):
        compare(a, write(tmp_path / "c.json", document()))


def test_notes_name_other_differences(a: Path, tmp_path: Path) -> None:
    machine = {"cpu": "another", "cores": 64}
    b = write(tmp_path / "b.json", document(point(ClosedLoop(1)), status="interrupted", machine=machine))
    notes = "\n".join(compare(a, b).notes)
    assert "b.json was not measured to its end (interrupted)" in notes
    assert "other machines" in notes
    assert "and another" in notes
    assert compare(a, a).notes == []


def test_goodput_needs_the_same_slo(a: Path, tmp_path: Path) -> None:
    loads = point(ClosedLoop(1)), point(ClosedLoop(2))
    b = write(tmp_path / "b.json", document(*loads, slo=Slo(ttft=1.5)))
    c = write(tmp_path / "c.json", document(*loads, slo=Slo(ttft=0.5)))
    assert "goodput_per_s" in {row.metric for row in compare(b, b).rows}
    comparison = compare(b, c)
    assert "goodput_per_s" not in {row.metric for row in comparison.rows}
    assert "other SLOs: goodput is left out" in comparison.notes


def without(part: str) -> dict[str, Any]:
    return {name: value for name, value in document(point(ClosedLoop(1))).items() if name != part}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "does not hold results"),
        ("[1]", "does not hold results"),
        ("[" * 100_000, "does not hold results"),
        ('{"kind": "nvlm-trt bench"}', "no 'schema_version'"),
        ('{"kind": "shopping list"}', "of kind 'shopping list'"),
        (json.dumps(document() | {"schema_version": 99}), "schema version 99"),
        (json.dumps(document() | {"points": 3}), "does not hold results"),
        (json.dumps(without("workload")), "no 'workload'"),
    ],
)
def test_files_without_results_are_an_error(a: Path, tmp_path: Path, content: str, reason: str) -> None:
    b = tmp_path / "b.json"
    b.write_text(content)
    with pytest.raises(RequestError) as raised:
        compare(a, b)
    assert reason in str(raised.value)
    assert str(b) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_files_are_an_error(a: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(RequestError, match="cannot read results"):
            compare(a, path)
