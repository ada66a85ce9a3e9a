"""The results of a benchmark as a document: JSON that is rewritten after every load, and CSV with a row per load."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nvlm_trt.benchmark.caveats import caveats
from nvlm_trt.benchmark.latency_parts import Stages
from nvlm_trt.benchmark.metrics import Slo, summarize
from nvlm_trt.benchmark.runner import Outcome, Plan, Point
from nvlm_trt.benchmark.target import Target
from nvlm_trt.errors import NvlmError, RequestError

KIND, SCHEMA_VERSION = "nvlm-trt bench", 1
Document = dict[str, Any]

_PACKAGES = ("nvlm-trt", "tritonclient", "grpcio", "numpy")


class Report:
    """Grows load by load; the file, if there is one, always holds all of it."""

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
            "versions": _versions(),
            "machine": _machine(),  # the client's
            "server": target.to_dict(),
            "workload": plan.workload.to_dict(),
            "slo": {"ttft_s": slo.ttft, "itl_s": slo.itl},
            "processes": plan.processes,
            "timeout_s": plan.timeout,
            "points": [],
        }

    def add(self, point: Point) -> None:
        self.document["points"].append(self._entry(point))
        self.publish()

    def finish(self, outcome: Outcome) -> None:
        self.document["status"] = outcome.status
        self.document["reason"] = str(outcome.failure) if outcome.failure else None
        self.publish()

    def publish(self) -> None:
        if self.path is not None:
            write_whole(self.path, json.dumps(self.document, indent=2) + "\n")

    def _entry(self, point: Point) -> dict[str, Any]:
        metrics, stages = summarize(point.records, self._slo), Stages.of(point.records, point.server)
        client = point.client
        entry = {
            "load": point.load.to_dict(),
            "status": point.status,
            "metrics": asdict(metrics),
            "stages": stages.to_dict() if stages else None,
            "server": point.server.to_dict() if point.server else None,
            "client": asdict(client) | {"busiest": client.busiest, "share": client.share} if client else None,
            "errors": _errors(point),
            "caveats": list(caveats(point, metrics, self._workload)),
        }
        if self._with_records:
            entry["records"] = [record.to_json(point.started) for record in point.records]
        return entry


def read_document(path: Path) -> Document:
    """Raises RequestError unless it holds results of this version."""
    remedy = "name a file that `nvlm-trt bench --output` wrote"
    try:
        document = json.loads(path.read_bytes())
        if document["kind"] != KIND:
            raise ValueError(f"it is of kind {str(document['kind'])[:40]!r}")
        version = document["schema_version"]
        if version == SCHEMA_VERSION:
            _check_shape(document)
    except OSError as error:
        raise RequestError(f"cannot read results {path} ({error.strerror}); {remedy}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        detail = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise RequestError(f"{path} does not hold results of a benchmark ({detail}); {remedy}") from None
    if version != SCHEMA_VERSION:
        raise RequestError(
            f"{path} is of schema version {version}, this nvlm-trt reads {SCHEMA_VERSION}; measure again with this one"
        )
    return document


def to_csv(document: Document) -> str:
    """A row per load; names end in their unit. What was not measured is empty."""
    rows = [_flat(point) for point in document["points"]]
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["mode"]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_whole(path: Path, content: str | bytes) -> None:
    """Beside `path`, then renamed: a file of that name is always whole. Raises NvlmError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise NvlmError(f"cannot write {path} ({reason}); free space there or choose another place") from None


def _check_shape(document: Document) -> None:
    """What is read later on is there."""
    for part in ("status", "started", "machine", "server", "workload", "slo"):
        document[part]
    for point in document["points"]:
        point["load"]["mode"], point["status"], point["metrics"]["ok"], point["stages"]


def _errors(point: Point) -> list[dict[str, Any]]:
    """What went wrong, and how often."""
    counts: dict[tuple[str, str], int] = {}
    for record in point.records:
        if record.error:
            key = record.status, record.error
            counts[key] = counts.get(key, 0) + 1
    return [{"status": status, "error": error, "count": count} for (status, error), count in counts.items()]


def _flat(point: Mapping[str, Any]) -> dict[str, Any]:
    """{"ttft_s": {"p50": 1}} -> {"ttft_p50_s": 1}"""
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


_DISTRIBUTIONS = ("ttft_s", "itl_s", "tpot_s", "e2e_s", "send_lag_s")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _machine() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "cpu": _first_value(Path("/proc/cpuinfo"), "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": _first_value(Path("/proc/meminfo"), "MemTotal"),
    }


def _first_value(path: Path, key: str) -> str | None:
    """Of a file of `key : value` lines."""
    try:
        lines: Sequence[str] = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(key))
    return next(values, None)
