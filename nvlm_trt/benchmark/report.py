"""Collects the results of a benchmark in one document and rewrites its file after every load."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nvlm_trt.benchmark.caveats import caveats
from nvlm_trt.benchmark.latency_parts import LatencyParts
from nvlm_trt.benchmark.machine import machine, versions
from nvlm_trt.benchmark.metrics import summarize
from nvlm_trt.benchmark.plan import Plan
from nvlm_trt.benchmark.point import Point
from nvlm_trt.benchmark.results_document import KIND, SCHEMA_VERSION, Document, write_whole
from nvlm_trt.benchmark.runner import Outcome
from nvlm_trt.benchmark.slo import Slo
from nvlm_trt.benchmark.target import Target


class Report:
    """Grows load by load. The file, if there is one, always holds the whole document."""

    def __init__(self, plan: Plan, target: Target, slo: Slo, path: Path | None, with_records: bool) -> None:
        self.path = path
        self._slo = slo
        self._with_records = with_records
        self._workload = plan.workload
        self.document: Document = {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "status": "running",
            "reason": None,
            "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "versions": versions(),
            "machine": machine(),  # the client's
            "server": target.to_dict(),
            "workload": plan.workload.to_dict(),
            "slo": {"ttft_s": slo.ttft, "itl_s": slo.itl},
            "processes": plan.processes,
            "timeout_s": plan.timeout,
            "points": [],
        }

    def add(self, point: Point) -> None:
        """Adds one load and publishes."""
        self.document["points"].append(self._entry(point))
        self.publish()

    def finish(self, outcome: Outcome) -> None:
        """Notes how the run ended and publishes."""
        self.document["status"] = outcome.status
        self.document["reason"] = str(outcome.failure) if outcome.failure else None
        self.publish()

    def publish(self, overwrite: bool = True) -> None:
        """Writes the file, if there is one. Raises NvlmError, also for a file that exists unless `overwrite`."""
        if self.path is not None:
            write_whole(self.path, json.dumps(self.document, indent=2, allow_nan=False) + "\n", overwrite)

    def _entry(self, point: Point) -> dict[str, Any]:
        metrics, parts = summarize(point.records, self._slo), LatencyParts.of(point.records, point.server)
        client = point.client
        entry = {
            "load": point.load.to_dict(),
            "status": point.status,
            "metrics": asdict(metrics),
            "stages": parts.to_dict() if parts else None,
            "server": point.server.to_dict() if point.server else None,
            "client": asdict(client) | {"busiest": client.busiest, "share": client.share} if client else None,
            "errors": _errors(point),
            "caveats": list(caveats(point, metrics, self._workload)),
        }
        if self._with_records:
            entry["records"] = [record.to_json(point.started) for record in point.records]
        return entry


def _errors(point: Point) -> list[dict[str, Any]]:
    """Counts each error, in the order in which they came up."""
    counts = Counter((record.status, record.error) for record in point.records if record.error)
    return [{"status": status, "error": error, "count": count} for (status, error), count in counts.items()]
