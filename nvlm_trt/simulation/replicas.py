"""Finds how many replicas of an engine a rate of requests needs."""

from __future__ import annotations

from dataclasses import dataclass

from nvlm_trt.benchmark.metrics import Metrics, summarize
from nvlm_trt.benchmark.slo import Slo
from nvlm_trt.errors import NvlmError
from nvlm_trt.progress import Progress
from nvlm_trt.simulation.replica import Replica
from nvlm_trt.simulation.traffic import Traffic

GOAL = 0.95  # share of the requests that have to meet the SLO
_MOST = 1 << 16


@dataclass(frozen=True)
class Sizing:
    """How many replicas are enough, and what requests meet there."""

    replicas: int
    rate: float  # of all replicas, requests per second
    metrics: Metrics  # of one replica
    fewer: Metrics | None  # with one replica less; None: there is none less


def size_fleet(replica: Replica, traffic: Traffic, rate: float, slo: Slo, progress: Progress) -> Sizing:
    """Return the least number of replicas with which GOAL of the requests meet `slo`. Each replica has its share of a
    Poisson process of `rate` requests per second, as behind a balancer that knows nothing of their load.

    Raises NvlmError if no number is enough: an idle engine misses the SLO."""
    tried: dict[int, Metrics] = {}

    def enough(replicas: int) -> bool:
        if replicas not in tried:
            progress("simulating", len(tried), len(tried) + 1)
            tried[replicas] = summarize(replica.answer(traffic, rate / replicas), slo)
        met = tried[replicas].slo_met
        return met is not None and met >= GOAL

    most = 1
    while not enough(most):
        if most >= _MOST or _is_idle(tried[most]):
            raise NvlmError(_refusal(tried[most], slo))
        most *= 2
    least = most // 2  # is not enough
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if enough(middle) else (middle, most)
    progress("simulating", len(tried), len(tried))
    return Sizing(most, rate, tried[most], tried.get(most - 1))


def _is_idle(metrics: Metrics) -> bool:
    """Return whether requests hardly ever meet another one."""
    return metrics.in_flight_mean is not None and metrics.in_flight_mean < 0.02


def _refusal(metrics: Metrics, slo: Slo) -> str:
    parts = []
    if slo.ttft is not None and metrics.ttft_s:
        parts.append(f"TTFT {1e3 * metrics.ttft_s.p50:.0f} ms of {1e3 * slo.ttft:.0f}")
    if slo.itl is not None and metrics.tpot_s:
        parts.append(f"{1e3 * metrics.tpot_s.p50:.1f} ms per token of {1e3 * slo.itl:.0f}")
    return (
        f"no number of replicas meets the SLO, an idle one has {', '.join(parts)}; choose a faster --gpu, a smaller "
        "--precision, fewer --tiles, or raise --slo-ttft or --slo-itl"
    )
