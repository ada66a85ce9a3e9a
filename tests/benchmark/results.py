"""Makes up benchmark results for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nvlm_trt.api import Usage
from nvlm_trt.benchmark.load import ClosedLoop, Load
from nvlm_trt.benchmark.plan import Plan
from nvlm_trt.benchmark.point import ClientUse, Ending, Point
from nvlm_trt.benchmark.record import Record
from nvlm_trt.benchmark.report import Report
from nvlm_trt.benchmark.results_document import Document
from nvlm_trt.benchmark.runner import Outcome
from nvlm_trt.benchmark.slo import Slo
from nvlm_trt.benchmark.target import Target
from nvlm_trt.benchmark.workload import ImageSize, Lengths, Workload

WORKLOAD = Workload(Lengths(8, 8), Lengths(3, 3), 1, (ImageSize(56, 56),), False, None, 4, None, 0)
TARGET = Target("grpc://127.0.0.1:8001", "2.51.0", "engines/h", "nvlm-h-tiny", "0123")


def point(load: Load, slower: float = 1.0, status: Ending = "complete", tokens: int = 3) -> Point:
    """Four answers, one after the other: the first token comes after 1 s, the others 1 s apart; times `slower`."""
    records = []
    for index in range(4):
        sent = 10.0 * index * slower
        arrivals = [(sent + number * slower, 1) for number in range(1, tokens + 1)]
        times = {"encode_s": 0.3 * slower, "queue_s": 0.5 * slower, "ttft_s": 0.9 * slower, "total_s": tokens * slower}
        usage = Usage(30, tokens, 7, 0, 0, **times)
        ended = arrivals[-1][0]
        records.append(Record(index, tokens, 1, sent=sent, ended=ended, status="ok", arrivals=arrivals, usage=usage))
    return Point(load, status, 0.0, records, None, ClientUse(40.0, [1.0], 0.5, 2))


def document(*points: Point, workload: Workload = WORKLOAD, slo: Slo | None = None, **changes: Any) -> Document:
    loads = [p.load for p in points] or [ClosedLoop(1)]
    report = Report(Plan(TARGET.url, workload, loads), TARGET, slo or Slo(), None, with_records=False)
    for p in points:
        report.add(p)
    report.finish(Outcome("complete"))
    return json.loads(json.dumps(report.document | changes))


def write(path: Path, content: Document) -> Path:
    path.write_text(json.dumps(content))
    return path
