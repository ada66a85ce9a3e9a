"""Compares two runs of one workload, number by number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from nvlm_trt.benchmark.load import describe
from nvlm_trt.benchmark.results_document import Document, read_document
from nvlm_trt.errors import RequestError

Better = Literal["lower", "higher"]

# place in a point's metrics -> the better direction
COMPARED: dict[str, Better] = {
    **{f"{name}.{part}": "lower" for name in ("ttft_s", "itl_s", "tpot_s", "e2e_s") for part in ("p50", "p90", "p99")},
    **{f"{name}_per_s": "higher" for name in ("output_tokens", "requests", "images", "tiles", "goodput")},
}


@dataclass(frozen=True)
class Row:
    """Holds one number of one load in both runs."""

    load: str
    metric: str
    better: Better
    a: float
    b: float

    @property
    def ratio(self) -> float | None:
        """Returns b / a, None if a is 0."""
        return self.b / self.a if self.a else None

    @property
    def verdict(self) -> Literal["better", "worse", "equal"]:
        """Says whether b is better than a. Only their order counts: this class does not know how much runs vary."""
        if self.a == self.b:
            return "equal"
        return "better" if (self.b < self.a) == (self.better == "lower") else "worse"


@dataclass(frozen=True)
class Comparison:
    """Holds the names of two result files and the rows that both have."""

    a: str
    b: str
    rows: list[Row]
    notes: list[str]  # other differences between the runs

    def to_dict(self) -> dict[str, Any]:
        rows = [asdict(row) | {"ratio": row.ratio, "verdict": row.verdict} for row in self.rows]
        return {"a": self.a, "b": self.b, "rows": rows, "notes": self.notes}


def compare(path_a: Path, path_b: Path) -> Comparison:
    """Compares two result files.

    Raises RequestError if a file holds no results, the workloads differ, or no load is in both.
    """
    a, b = read_document(path_a), read_document(path_b)
    if different := [name for name in {**a["workload"], **b["workload"]} if _differs(a, b, "workload", name)]:
        values = ", ".join(f"{n} {a['workload'].get(n)!r} and {b['workload'].get(n)!r}" for n in different)
        raise RequestError(
            f"{path_a} and {path_b} have different workloads ({values}); measure both with the same options"
        )
    points_a, points_b = _complete_points(a), _complete_points(b)
    common = [load for load in points_a if load in points_b]
    if not common:
        there = " and ".join(", ".join(points) or "none" for points in (points_a, points_b))
        raise RequestError(
            f"{path_a} and {path_b} have no load in common that was measured to its end ({there}); measure both at the "
            "same loads"
        )
    rows = [row for load in common for row in _rows(load, points_a[load], points_b[load], a["slo"] == b["slo"])]
    return Comparison(str(path_a), str(path_b), rows, list(_notes(a, b, str(path_a), str(path_b))))


def _differs(a: Document, b: Document, part: str, name: str) -> bool:
    missing = object()
    return a[part].get(name, missing) != b[part].get(name, missing)


def _complete_points(document: Document) -> dict[str, Mapping[str, Any]]:
    return {describe(point["load"]): point for point in document["points"] if point["status"] == "complete"}


def _rows(load: str, a: Mapping[str, Any], b: Mapping[str, Any], same_slo: bool) -> Iterator[Row]:
    for metric, better in COMPARED.items():
        if metric == "goodput_per_s" and not same_slo:
            continue
        values = [_value(point["metrics"], metric) for point in (a, b)]
        # skips 0 in both runs: without images, rates of images say nothing
        if values[0] is not None and values[1] is not None and any(values):
            yield Row(load, metric, better, values[0], values[1])


def _value(metrics: Mapping[str, Any], metric: str) -> float | None:
    name, _, part = metric.partition(".")
    value = metrics.get(name)
    return value[part] if part and value else value


def _notes(a: Document, b: Document, path_a: str, path_b: str) -> Iterator[str]:
    for document, path in ((a, path_a), (b, path_b)):
        if document["status"] != "complete":
            yield f"{path} was not measured to its end ({document['status']})"
        for point in document["points"]:
            errors = point["metrics"]["rejected"] + point["metrics"]["failed"]
            if errors and point["status"] == "complete":
                yield f"{path}, {describe(point['load'])}: {errors} of {point['metrics']['requests']} requests failed"
    for part, name, title in (
        ("machine", "cpu", "machines"),
        ("machine", "cores", "cores"),
        ("server", "triton", "versions of Triton"),
        ("versions", "nvlm-trt", "versions of nvlm-trt"),
    ):
        if part in a and part in b and _differs(a, b, part, name):
            yield f"other {title}: {a[part].get(name)} and {b[part].get(name)}"
    if a["slo"] != b["slo"]:
        yield "other SLOs: goodput is left out"
