"""Shows the part of `nvlm-trt plan` that is about a rate of requests: how many replicas it needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvlm_trt import terminal
from nvlm_trt.benchmark.slo import Slo
from nvlm_trt.benchmark.workload import Lengths
from nvlm_trt.commands.plan_sections import show_table
from nvlm_trt.errors import NvlmError
from nvlm_trt.simulation.replica import Replica
from nvlm_trt.simulation.replicas import GOAL, Sizing, size_fleet
from nvlm_trt.simulation.step_seconds import PlannedSteps, StepSeconds, read_steps
from nvlm_trt.simulation.traffic import Traffic

if TYPE_CHECKING:
    from rich.console import Console

    from nvlm_trt.benchmark.distribution import Distribution
    from nvlm_trt.commands.plan_load import Load
    from nvlm_trt.planner.design import EngineDesign
    from nvlm_trt.planner.step_times import StepTimes

_REQUESTS = 250  # of a simulation
_TTFT, _ITL = 2.0, 0.1  # seconds: the goals if none is stated


@dataclass(frozen=True)
class Steps:
    """Step times, and where they come from."""

    seconds: StepSeconds
    source: str


def find_steps(planned: StepTimes | None, measured: Path | None) -> Steps:
    """Read measured step times, or take the planned ones. Raises NvlmError if there are none of either."""
    if measured is not None:
        found = read_steps(measured)
        return Steps(found, f"measured, {found.engine} on {found.machine}")
    if planned is None:
        raise NvlmError("--fleet needs step times; give --gpu, --bandwidth and --tflops, or --step-times FILE")
    return Steps(PlannedSteps(planned), "planned")


def find_traffic(design: EngineDesign, load: Load, output_tokens: int) -> Traffic:
    """Make requests that are all like `load`. Raises RequestError if they do not fit in a slot."""
    text, output = load.text_tokens, output_tokens
    traffic = Traffic(Lengths(text, text), Lengths(output, output), load.tiles, _REQUESTS)
    traffic.check(design.config, design.limits, design.tag_length)
    return traffic


def slo_of(ttft: float | None, itl: float | None) -> Slo:
    """Make the SLO of goals in milliseconds; without any, that of the defaults. Raises NvlmError."""
    if not all(value is None or 0 < value <= 1e9 for value in (ttft, itl)):
        raise NvlmError("--slo-ttft and --slo-itl are milliseconds above 0; give --slo-ttft 2000 for example")
    if ttft is None and itl is None:
        return Slo(_TTFT, _ITL)
    return Slo(None if ttft is None else ttft / 1e3, None if itl is None else itl / 1e3)


@dataclass(frozen=True)
class ReplicasSection:
    """How many replicas are enough."""

    sizing: Sizing
    slo: Slo
    source: str  # of the step times
    gpus: int  # of one replica; 0: it runs on the CPU

    @classmethod
    def of(
        cls, design: EngineDesign, steps: Steps, traffic: Traffic, rate: float, slo: Slo, gpus: int
    ) -> ReplicasSection:
        """Simulate. Raises NvlmError for an SLO that an idle engine misses, RequestError for an impossible `rate`."""
        with terminal.progress() as progress:
            sizing = size_fleet(Replica(design, steps.seconds), traffic, rate, slo, progress)
        return cls(sizing, slo, steps.source, gpus)

    def to_dict(self) -> dict[str, Any]:
        return {
            "replicas": {
                "needed": self.sizing.replicas,
                "gpus": self.sizing.replicas * self.gpus,
                "rate_per_s": self.sizing.rate,
                "slo": {**asdict(self.slo), "share": GOAL},
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
        needed = f"{sizing.replicas} replica" + "s" * (sizing.replicas > 1)
        fewer = f", {_met(sizing.fewer.slo_met)} with one replica less" if sizing.fewer else ""
        console.print(
            f"{sizing.rate:g} requests/s need {needed}{gpus} for {' and '.join(bounds)} in {GOAL:.0%} of the requests: "
            f"{_met(metrics.slo_met)} meet it{fewer}",
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
