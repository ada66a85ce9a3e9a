"""Shows the parts of `nvlm-trt plan`: memory, times and the cost of a build, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from nvlm_trt.planner import step_times
from nvlm_trt.planner.fit import Fit
from nvlm_trt.planner.step_times import StepTime, StepTimes, time_of_prompt
from nvlm_trt.terminal import scaled

if TYPE_CHECKING:
    from rich.console import Console

    from nvlm_trt.commands.plan_load import Load
    from nvlm_trt.planner.build_cost import BuildCost
    from nvlm_trt.planner.design import EngineDesign
    from nvlm_trt.planner.memory import EnginePlan


class Section(Protocol):
    """One part of a plan."""

    def to_dict(self) -> dict[str, Any]:
        """Return the entries that the part has in the JSON object."""
        ...

    def show(self, console: Console) -> None: ...


@dataclass(frozen=True)
class MemorySection:
    """The memory of an engine on one device, and how many slots fit in it."""

    plan: EnginePlan
    fit: Fit | None  # None: the device's memory is not known
    title: str  # of the device
    built: bool

    def to_dict(self) -> dict[str, Any]:
        fit = None if self.fit is None else {**asdict(self.fit), "fits": self.fit.fits}
        return {"memory": asdict(self.plan), "fit": fit}

    def show(self, console: Console) -> None:
        show_table(console, ("memory", "parameters", "bytes"), list(self._rows()))
        if self.fit:
            console.print(self._verdict(self.fit), markup=False, soft_wrap=True)

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        plan = self.plan
        for component, nbytes in plan.weights.items():
            parameters = plan.parameters.get(component)
            yield f"{component} in files", scaled(parameters, "") if parameters else "", scaled(nbytes, "B")
        rows = {
            "weights held": sum(stage.weights for stage in plan.stages.values()),
            "weights mapped from files": sum(stage.mapped for stage in plan.stages.values()),
            "KV cache": plan.self_cache,
            "cross-attention cache": plan.cross_cache,
            "activations": sum(stage.activations for stage in plan.stages.values()),
            "runtimes": sum(stage.overhead for stage in plan.stages.values()),
            "image cache, at most": plan.image_cache,
            "while serving": plan.peak_running,
        }
        for name, nbytes in rows.items():
            if nbytes:
                yield name, "", scaled(nbytes, "B")

    def _verdict(self, fit: Fit) -> str:
        of = f"{fit.share:g} of {fit.memory / 1e9:.1f} GB ({self.title})"
        if fit.fits:
            return f"Fits in {of}: {fit.slots} slots of this context would, {fit.wanted} are asked for"
        slots = f"{fit.slots} slots do" if fit.slots > 0 else "not even one slot does"
        if self.built:
            return f"Does not fit in {of}: {slots}; rebuild it smaller: `nvlm-trt plan --checkpoint DIR` says how"
        if not fit.changes:
            return f"Does not fit in {of}: {slots}; no other precision or context helps: take another --backend"
        return f"Does not fit in {of}: {slots}. Any of these would: {', '.join(fit.changes)}"


@dataclass(frozen=True)
class TimesSection:
    """What a request takes on an idle engine, and how fast several are decoded."""

    load: Load
    steps: Mapping[str, StepTime]
    engines: int  # that share the load
    assumed: Mapping[str, float]

    @classmethod
    def of(cls, times: StepTimes, load: Load, engines: int, others: Mapping[str, float]) -> TimesSection:
        """`others`: assumptions beside those of `step_times`."""
        steps = {"image": times.encode(load.tiles)} if load.tiles else {}
        steps["prompt"] = time_of_prompt(times, load.tokens, load.cross_tokens)
        for sequences in sorted({1, load.concurrency}):
            steps[_token(sequences)] = times.decode(sequences, load.tokens + 1, load.cross_tokens)
        assumed = {
            "compute efficiency": step_times.COMPUTE_EFFICIENCY,
            "memory efficiency": step_times.MEMORY_EFFICIENCY,
            **others,
        }
        return cls(load, steps, engines, assumed)

    @property
    def ttft(self) -> float:
        return sum(self.steps[name].seconds for name in ("image", "prompt") if name in self.steps)

    @property
    def tokens_per_s(self) -> float:
        step = self.steps[_token(self.load.concurrency)]
        return self.engines * self.load.concurrency / step.seconds

    def to_dict(self) -> dict[str, Any]:
        return {
            "times": {name: {**asdict(time), "seconds": time.seconds} for name, time in self.steps.items()},
            "ttft_s": self.ttft,
            "tokens_per_s": self.tokens_per_s,
            "engines": self.engines,
            "assumed": dict(self.assumed),
        }

    def show(self, console: Console) -> None:
        columns = ("", "time", "products", "memory", "messages")
        rows = [
            (name, *(_ms(part) for part in (time.seconds, time.products, time.memory, time.communication)))
            for name, time in self.steps.items()
        ]
        show_table(console, columns, rows)
        on = f" on {self.engines} engines" if self.engines > 1 else ""
        load = self.load
        console.print(
            f"A request of {load.text_tokens} text tokens and {load.tiles} tiles, {load.tokens} tokens in the LLM: "
            f"TTFT {_ms(self.ttft)} on an idle engine; {self.tokens_per_s:.0f} tokens/s with {load.concurrency} at "
            f"once{on}",
            soft_wrap=True,
        )
        assumed = ", ".join(f"{name} {value:g}" for name, value in self.assumed.items())
        console.print(f"Assumed, not measured: {assumed}.", soft_wrap=True)


@dataclass(frozen=True)
class BuildSection:
    """What the build takes."""

    cost: BuildCost
    disk_bandwidth: float  # bytes per second
    calibration: Calibration | None  # None: the engine needs none

    def to_dict(self) -> dict[str, Any]:
        seconds = self.cost.seconds(self.disk_bandwidth)
        calibration = None if self.calibration is None else asdict(self.calibration)
        build = {**asdict(self.cost), "disk": self.cost.disk, "seconds": seconds, "calibration": calibration}
        return {"build": build}

    def show(self, console: Console) -> None:
        cost = self.cost
        rows = {
            "disk, at most": cost.disk,
            "of it the engine": cost.engine,
            "host memory": cost.host_memory,
            "the least, without a gate": cost.least_host_memory if cost.least_host_memory < cost.host_memory else 0,
            "GPU memory, in all": cost.device_memory,
            "read and written": cost.moved,
        }
        shown = [(name, scaled(nbytes, "B")) for name, nbytes in rows.items() if nbytes]
        show_table(console, ("build", "bytes"), shown)
        console.print(
            f"{cost.seconds(self.disk_bandwidth):.0f} s at {self.disk_bandwidth / 1e9:g} GB/s, beside the samples of a "
            "calibration and a gate and a builder's search for kernels",
            soft_wrap=True,
        )
        if self.calibration is not None:
            console.print(str(self.calibration), soft_wrap=True)


@dataclass(frozen=True)
class Calibration:
    """The time of a calibration on the CPU of this machine."""

    samples: int
    seconds: float
    flops_per_s: float  # measured here

    @classmethod
    def of(cls, design: EngineDesign, load: Load) -> Calibration | None:
        """Estimate the time of the default number of samples that are like `load`. None: nothing is calibrated."""
        from nvlm_trt.builders.engine_build import CALIBRATION_SAMPLES
        from nvlm_trt.model.precision import needs_calibration
        from nvlm_trt.planner.calibration_time import calibration_seconds, measured_flop_rate

        if not needs_calibration(design.precisions):
            return None
        rate = measured_flop_rate()
        seconds = calibration_seconds(
            design.config, CALIBRATION_SAMPLES, load.text_tokens, load.tiles, rate, design.tag_length
        )
        return cls(CALIBRATION_SAMPLES, seconds, rate)

    def __str__(self) -> str:
        return (
            f"Calibration: {self.seconds / 3600:.1f} h for {self.samples} such requests on this machine's CPU, which "
            f"multiplies {self.flops_per_s / 1e12:.2f} TFLOP/s in float32"
        )


def show_table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _token(sequences: int) -> str:
    return f"token, {sequences} request" + "s" * (sequences > 1)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
