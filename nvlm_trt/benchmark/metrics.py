"""Computes the numbers that a benchmark reports for one load from its requests. Times are seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nvlm_trt.benchmark.distribution import Distribution
from nvlm_trt.benchmark.record import Record, Status
from nvlm_trt.benchmark.request_metrics import end_to_end, mean_interval, send_lag, token_intervals, ttft
from nvlm_trt.benchmark.slo import Slo


@dataclass(frozen=True)
class Metrics:
    """Holds the numbers of one load, without warm-up requests. Latencies and rates cover only the requests that are ok.

    duration: from the first ok request sent to the last ok request ended. Every rate is a sum / duration.
    """

    requests: int  # measured, with any status
    ok: int
    rejected: int
    failed: int
    refused: int
    cancelled: int
    duration_s: float | None
    ttft_s: Distribution | None
    itl_s: Distribution | None  # over all token intervals of all requests
    tpot_s: Distribution | None  # over the requests' mean intervals: does not show whether tokens arrive in bursts
    e2e_s: Distribution | None
    requests_per_s: float | None  # ok / duration
    output_tokens: int
    output_tokens_per_s: float | None
    images: int
    images_per_s: float | None  # cached images included
    cached_images: int  # images whose features the server had cached
    tiles: int
    tiles_per_s: float | None  # thumbnails and the tiles of cached images included
    prompt_tokens_mean: float | None  # in the LLM's sequence, as the server counts: format and images included
    in_flight_mean: float | None  # sum of end to end / duration (Little)
    tokens_per_delta: float | None  # tokens / deltas: above 1, some tokens arrive together
    goodput_per_s: float | None  # requests that meet the SLO / duration; None: no SLO was stated
    slo_met: float | None  # requests that meet the SLO / measured requests that the client did not cancel
    send_lag_s: Distribution | None  # over all requests that were due at a set time


def summarize(records: Sequence[Record], slo: Slo | None = None) -> Metrics:
    """Computes the metrics of a load from all its requests, except the warm-up."""
    measured = [record for record in records if not record.warmup]
    done = [record for record in measured if record.status == "ok"]
    usages = [record.usage for record in done if record.usage is not None]
    duration = max(r.ended for r in done) - min(r.sent for r in done) if done else None
    good = sum(map(slo.is_met, done)) if slo is not None and slo.is_stated else None
    counted = len(measured) - _count(measured, "cancelled")
    tokens = sum(record.tokens for record in done)
    images = sum(record.images for record in done)
    tiles = sum(usage.image_tiles for usage in usages)

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
