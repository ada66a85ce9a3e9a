"""Decides whether a request was fast enough to count as goodput."""

from __future__ import annotations

from dataclasses import dataclass

from nvlm_trt.benchmark.record import Record
from nvlm_trt.benchmark.request_metrics import mean_interval, ttft


@dataclass(frozen=True)
class Slo:
    """States the service level objective of a request: upper bounds in seconds, None for no bound."""

    ttft: float | None = None
    itl: float | None = None  # for the request's mean interval

    @property
    def is_stated(self) -> bool:
        return self.ttft is not None or self.itl is not None

    def is_met(self, record: Record) -> bool:
        """Tells whether the answer is complete and within each bound. A request with a single delta has no interval."""
        if record.status != "ok":
            return False
        first, interval = ttft(record), mean_interval(record)
        return (self.ttft is None or (first is not None and first <= self.ttft)) and (
            self.itl is None or interval is None or interval <= self.itl
        )
