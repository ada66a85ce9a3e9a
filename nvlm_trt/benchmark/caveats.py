"""What makes a measurement doubtful, said next to it."""

from __future__ import annotations

from collections.abc import Iterator

from nvlm_trt.benchmark.metrics import Metrics
from nvlm_trt.benchmark.runner import Point
from nvlm_trt.benchmark.workload import Workload

_BUSY_CLIENT = 0.8  # of a core
_LATE_CLIENT = 0.1  # of the median TTFT


def caveats(point: Point, metrics: Metrics, workload: Workload) -> Iterator[str]:
    if point.status != "complete":
        yield f"cut short: {metrics.ok} of {workload.requests} requests are measured"
    if point.client and point.client.busiest > _BUSY_CLIENT:
        yield f"a client process used {point.client.busiest:.0%} of a core and may have been too slow; add --processes"
    if metrics.send_lag_s and metrics.ttft_s and metrics.send_lag_s.p99 > _LATE_CLIENT * metrics.ttft_s.p50:
        yield f"the client was late: p99 of its requests was sent {metrics.send_lag_s.p99 * 1e3:.0f} ms behind time"
    if metrics.cached_images and not workload.repeat_images:
        yield f"{metrics.cached_images} of {metrics.images} pictures were cached although each was new"
    if workload.images and workload.repeat_images and metrics.cached_images < metrics.images:
        yield f"{metrics.images - metrics.cached_images} of {metrics.images} repeated pictures were not cached"
    if point.server is not None and point.status == "complete":
        ours = sum(record.tokens for record in point.records)
        made = round(point.server.counters.get("generated_tokens", 0))
        if made != ours:
            yield f"the server made {made} tokens and {ours} were ours: others use it, or the metrics are another's"
