"""Warns of measurements that may be wrong, in words that stand next to the numbers."""

from __future__ import annotations

from collections.abc import Iterator

from nvlm_trt.benchmark.metrics import Metrics
from nvlm_trt.benchmark.point import Point
from nvlm_trt.benchmark.workload import Workload

_BUSY_CLIENT = 0.8  # share of one core
_LATE_CLIENT = 0.1  # share of the median TTFT


def caveats(point: Point, metrics: Metrics, workload: Workload) -> Iterator[str]:
    """Yields each reason to doubt the measurement of one load."""
    if point.status != "complete":
        yield f"cut short: {metrics.ok} of {workload.requests} requests are measured"
    if point.client and point.client.busiest > _BUSY_CLIENT:
        yield f"a client process used {point.client.busiest:.0%} of a core and may have been too slow; add --processes"
    if metrics.send_lag_s and metrics.ttft_s and metrics.send_lag_s.p99 > _LATE_CLIENT * metrics.ttft_s.p50:
        lag = metrics.send_lag_s.p99 * 1e3
        yield f"the client was late: it sent 1 % of its requests at least {lag:.0f} ms behind time"
    if metrics.cached_images and not workload.repeat_images:
        yield f"{metrics.cached_images} of {metrics.images} images were cached although each was new"
    if workload.images and workload.repeat_images and metrics.cached_images < metrics.images:
        yield f"{metrics.images - metrics.cached_images} of {metrics.images} repeated images were not cached"
    if point.server is not None and point.status == "complete":
        received = sum(record.tokens for record in point.records)
        generated = round(point.server.counters.get("generated_tokens", 0))
        if generated != received:
            yield (
                f"the server made {generated} tokens and {received} were ours: others use this server, or "
                "--metrics-url names another server"
            )
