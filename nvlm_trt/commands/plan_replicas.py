"""Shows the part of `nvlm-trt plan` that is about a rate of requests: how many replicas it needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nvlm_trt.commands.plan_sections import show_table

if TYPE_CHECKING:
    from rich.console import Console

    from nvlm_trt.benchmark.distribution import Distribution
    from nvlm_trt.benchmark.slo import Slo
    from nvlm_trt.simulation.replicas import Sizing


@dataclass(frozen=True)
class ReplicasSection:
    sizing: Sizing
    slo: Slo
    goal: float
    source: str  # of the step times
    gpus: int  # of one replica; 0: it runs on the CPU

    def to_dict(self) -> dict[str, Any]:
        return {
            "replicas": {
                "needed": self.sizing.replicas,
                "gpus": self.sizing.replicas * self.gpus,
                "rate_per_s": self.sizing.rate,
                "slo": {**asdict(self.slo), "share": self.goal},
                "step_times": self.source,
                "metrics_of_one": asdict(self.sizing.metrics),
                "with_one_less": None if self.sizing.fewer is None else asdict(self.sizing.fewer),
            }
        }

    def show(self, console: Console) -> None:
        sizing, metrics = self.sizing, self.sizing.metrics
        bounds = [f"TTFT {1e3 * self.slo.ttft:g} ms"] if self.slo.ttft is not None else []
        bounds += [f"{1e3 * self.slo.itl:g} ms per token"] if self.slo.itl is not None else []
        gpus = f", {sizing.replicas * self.gpus} GPUs" if self.gpus else ""
        show_table(
            console,
            ("ms, of one replica", "mean", "p50", "p90", "p99"),
            [
                _row("TTFT", metrics.ttft_s),
                _row("inter-token latency", metrics.itl_s),
                _row("end to end", metrics.e2e_s),
            ],
        )
        console.print(
            f"{sizing.rate:g} requests/s need {sizing.replicas} replicas{gpus} for {' and '.join(bounds)} in "
            f"{self.goal:.0%} of the requests: {_met(metrics.slo_met)} meet it"
            + (f", {_met(sizing.fewer.slo_met)} with one replica less" if sizing.fewer else ""),
            soft_wrap=True,
        )
        console.print(f"Simulated with {metrics.requests} requests; step times: {self.source}.", soft_wrap=True)


def _row(name: str, distribution: Distribution | None) -> tuple[str, ...]:
    if distribution is None:
        return (name, "", "", "", "")
    values = (distribution.mean, distribution.p50, distribution.p90, distribution.p99)
    return (name, *(f"{1e3 * value:.1f}" for value in values))


def _met(share: float | None) -> str:
    return "none" if share is None else f"{share:.0%}"
