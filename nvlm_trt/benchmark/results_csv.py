"""Writes results as CSV, a row per load."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from nvlm_trt.benchmark.results_document import Document

_DISTRIBUTIONS = ("ttft_s", "itl_s", "tpot_s", "e2e_s", "send_lag_s")


def to_csv(document: Document) -> str:
    """Returns a row per load. Column names end in a unit; numbers that were not measured are empty."""
    rows = [_flat(point) for point in document["points"]]
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["mode"]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(point: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens the row of a load: {"ttft_s": {"p50": 1}} becomes {"ttft_p50_s": 1}."""
    load = point["load"]
    row = {"mode": load["mode"], "concurrency": load.get("concurrency"), "rate_per_s": load.get("rate")}
    row["status"] = point["status"]
    for name, value in point["metrics"].items():
        if name in _DISTRIBUTIONS:
            stem = name.removesuffix("_s")
            row |= {f"{stem}_{part}_s": (value or {}).get(part) for part in ("mean", "p50", "p90", "p99", "max")}
        else:
            row[name] = value
    row |= {f"stage_{name}": value for name, value in (point["stages"] or {}).items()}
    row |= {f"client_{name}": (point["client"] or {}).get(name) for name in ("busiest", "share")}
    return row
