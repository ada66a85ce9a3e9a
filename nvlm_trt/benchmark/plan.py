"""Holds the settings of a benchmark run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nvlm_trt.benchmark.load import Load
from nvlm_trt.benchmark.triton_metrics import TritonMetrics
from nvlm_trt.benchmark.workload import Workload


@dataclass(frozen=True)
class Plan:
    """Everything to measure: one workload at several loads, against one server."""

    url: str
    workload: Workload
    loads: Sequence[Load]
    processes: int = 1
    timeout: float = 1800  # seconds from the sending of a request to its end
    server_metrics: TritonMetrics | None = None
