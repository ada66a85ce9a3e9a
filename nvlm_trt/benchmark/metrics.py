"""Every number that a benchmark reports of its requests, and the formula of each. Times are seconds.

Of a request: sent, when the client hands it to gRPC; arrivals (t_j, k_j), j = 1 .. m: at t_j came a delta of k_j > 0
tokens; ended, when the last response came. The server sends tokens that are ready together in one delta.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nvlm_trt.benchmark.record import Record, Status


def ttft(record: Record) -> float | None:
    """Time to first token: t_1 - sent. None without a token."""
    return record.arrivals[0][0] - record.sent if record.arrivals else None


def token_intervals(record: Record) -> list[float]:
    """Inter-token latencies: each of the k_j tokens of delta j > 1 counts as (t_j - t_{j-1}) / k_j.

    The tokens of one delta were made one after the other since the delta before; their sum is what a reader waits.
    Those of the first delta have no interval: when its tokens were made is not seen, and TTFT covers it.
    """
    intervals = []
    for (before, _), (when, count) in zip(record.arrivals, record.arrivals[1:], strict=False):
        intervals += [(when - before) / count] * count
    return intervals


def mean_interval(record: Record) -> float | None:
    """Time per output token of a request: (t_m - t_1) / (k_2 + ... + k_m). None with a single delta."""
    intervals = token_intervals(record)
    return (record.arrivals[-1][0] - record.arrivals[0][0]) / len(intervals) if intervals else None


def end_to_end(record: Record) -> float:
    """ended - sent."""
    return record.ended - record.sent


def send_lag(record: Record) -> float | None:
    """sent - due: how late the client was. None if the load did not say when."""
    return None if record.due is None else record.sent - record.due


def percentile(values: Sequence[float], percent: float) -> float:
    """Of n sorted values the one at position (n - 1) * percent / 100, counted from 0; between two, interpolated.

    This is numpy's default. The p99 of fewer than 100 values lies between the two largest.
    """
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    # this form is exact where both are equal
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True)
class Slo:
    """What a request must keep to count as good. Seconds; None: no bound."""

    ttft: float | None = None
    itl: float | None = None

    @property
    def is_stated(self) -> bool:
        return self.ttft is not None or self.itl is not None

    def is_met(self, record: Record) -> bool:
        """Answered to the end, ttft <= its bound, and the request's mean interval <= its bound if it has one."""
        if record.status != "ok":
            return False
        first, interval = ttft(record), mean_interval(record)
        return (self.ttft is None or (first is not None and first <= self.ttft)) and (
            self.itl is None or interval is None or interval <= self.itl
        )


@dataclass(frozen=True)
class Distribution:
    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution | None:
        """None of nothing."""
        if not values:
            return None
        p50, p90, p99 = (percentile(values, percent) for percent in (50, 90, 99))
        return cls(len(values), math.fsum(values) / len(values), p50, p90, p99, max(values))


@dataclass(frozen=True)
class Metrics:
    """Of the measured requests; latencies and rates are of those that are ok.

    duration: from the first of them sent to the last of them ended. Every rate is a sum over them / duration.
    """

    requests: int  # measured, whatever became of them
    ok: int
    rejected: int
    failed: int
    refused: int
    cancelled: int
    duration_s: float | None
    ttft_s: Distribution | None
    itl_s: Distribution | None  # over all token intervals of all requests
    tpot_s: Distribution | None  # over the requests' mean intervals: tokens that arrive in bursts do not show in it
    e2e_s: Distribution | None
    requests_per_s: float | None  # ok / duration
    output_tokens: int
    output_tokens_per_s: float | None
    images: int
    images_per_s: float | None  # cached ones included
    cached_images: int  # whose features the server had
    tiles: int
    tiles_per_s: float | None  # thumbnails and those of cached images included
    prompt_tokens_mean: float | None  # in the LLM's sequence, as the server counts: format and pictures included
    in_flight_mean: float | None  # sum of end to end / duration (Little)
    tokens_per_delta: float | None  # tokens / deltas: above 1, some tokens arrive together
    goodput_per_s: float | None  # requests that meet the SLO / duration; None: no SLO was stated
    slo_met: float | None  # requests that meet the SLO / measured ones that were not cancelled by us
    send_lag_s: Distribution | None  # of all that had a time to be sent at


def summarize(records: Sequence[Record], slo: Slo | None = None) -> Metrics:
    """Warm-up requests are left out."""
    measured = [record for record in records if not record.warmup]
    done = [record for record in measured if record.status == "ok"]
    usages = [record.usage for record in done if record.usage is not None]
    duration = max(r.ended for r in done) - min(r.sent for r in done) if done else None
    good = sum(map(slo.is_met, done)) if slo is not None and slo.is_stated else None
    counted = len(measured) - _count(measured, "cancelled")
    tokens, images, tiles = (sum(n) for n in (map(_tokens, done), map(_images, done), (u.image_tiles for u in usages)))

    def rate(total: float | None) -> float | None:
        return total / duration if duration and total is not None else None

    return Metrics(
        requests=len(measured),
        ok=len(done),
        rejected=_count(measured, "rejected"),
        failed=_count(measured, "failed"),
        refused=_count(measured, "refused"),
        cancelled=_count(measured, "cancelled"),
        duration_s=duration,
        ttft_s=Distribution.of([first for record in done if (first := ttft(record)) is not None]),
        itl_s=Distribution.of([interval for record in done for interval in token_intervals(record)]),
        tpot_s=Distribution.of([mean for record in done if (mean := mean_interval(record)) is not None]),
        e2e_s=Distribution.of([end_to_end(record) for record in done]),
        requests_per_s=rate(len(done)),
        output_tokens=tokens,
        output_tokens_per_s=rate(tokens),
        images=images,
        images_per_s=rate(images),
        cached_images=sum(usage.cached_images for usage in usages),
        tiles=tiles,
        tiles_per_s=rate(tiles),
        prompt_tokens_mean=sum(usage.prompt_tokens for usage in usages) / len(usages) if usages else None,
        in_flight_mean=rate(math.fsum(end_to_end(record) for record in done)),
        tokens_per_delta=tokens / sum(len(record.arrivals) for record in done) if tokens else None,
        goodput_per_s=rate(good),
        slo_met=good / counted if good is not None and counted else None,
        send_lag_s=Distribution.of([lag for record in measured if (lag := send_lag(record)) is not None]),
    )


def _count(records: Sequence[Record], status: Status) -> int:
    return sum(record.status == status for record in records)


def _tokens(record: Record) -> int:
    return record.tokens


def _images(record: Record) -> int:
    return record.images
