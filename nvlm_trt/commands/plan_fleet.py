"""Shows the part of `nvlm-trt plan` that is about an engine on several GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nvlm_trt.backends.spec import BackendSpec
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.planner import fleet_times
from nvlm_trt.planner.fleet import USABLE_SHARE, Choice, FleetPlan, GpuMemory, plan_fleet, what_fits
from nvlm_trt.planner.fleet_times import FleetTime, FleetTimes
from nvlm_trt.planner.gpus import Gpu
from nvlm_trt.prompt.image_tokens import count_image_tokens


@dataclass(frozen=True)
class FleetReport:
    """The memory of each GPU, and with a GPU's data sheet: how many requests fit, the times, what fits otherwise."""

    plan: FleetPlan
    slots: int
    share: float
    gpu: Gpu | None
    requests: int | None  # of max_seq_len that fit at once
    times: dict[str, FleetTime]
    choices: list[Choice]  # the smallest fleet for each precision, if the asked one does not fit

    @classmethod
    def make(
        cls,
        config: NvlmConfig,
        limits: EngineLimits,
        precisions: Mapping[str, str],
        backend: BackendSpec,
        tag_length: int,
        tp: int,
        pp: int,
        gpu: Gpu | None,
        share: float | None,
        text_tokens: int,
        tiles: int,
    ) -> FleetReport:
        """Plan the fleet. The first arguments are those of `plan_fleet`; `text_tokens`, `tiles`: the prompt's."""
        plan = plan_fleet(config, limits, precisions, backend, tag_length, tp, pp)
        share = USABLE_SHARE if share is None else share
        if gpu is None:
            return cls(plan, limits.max_slots, share, None, None, {}, [])
        requests = plan.requests_that_fit(gpu.memory.value, share)
        times = FleetTimes(config, limits, precisions, backend, tag_length, tp, pp, gpu)
        in_llm, cross = count_image_tokens(config, tiles, tag_length)
        shown = {f"prefill, {part}": time for part, time in times.prefill(text_tokens, tiles).items()}
        for sequences in sorted({1, limits.max_slots}):
            name = f"decode, {sequences} request" + "s" * (sequences > 1)
            shown[name] = times.decode(sequences, text_tokens + in_llm + 1, cross)
        choices = what_fits(config, limits, backend, tag_length, gpu, share) if requests < 1 else []
        return cls(plan, limits.max_slots, share, gpu, requests, shown, choices)

    @property
    def fits(self) -> bool | None:
        return None if self.requests is None else self.requests >= 1

    def to_dict(self) -> dict[str, Any]:
        return {
            "tp": self.plan.tp,
            "pp": self.plan.pp,
            "stages": [
                {**asdict(stage), "total": stage.total(self.slots), "fixed": stage.fixed} for stage in self.plan.stages
            ],
            "memory_share": self.share,
            "fits": self.fits,
            "requests_that_fit": None if self.requests is None else max(self.requests, 0),
            "times": {name: {**asdict(time), "seconds": time.seconds} for name, time in self.times.items()},
            "assumed": _ASSUMED,
            "what_fits": [asdict(choice) for choice in self.choices],
        }

    def show(self, title: str) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        stages = _shown_stages(self.plan.stages)
        table = Table(box=SIMPLE_HEAD)
        table.add_column("bytes on one GPU", no_wrap=True)
        for stage in stages:
            table.add_column(f"stage {stage.stage}" if len(stages) > 1 else "", justify="right", no_wrap=True)
        for name, values in self._memory_rows(stages):
            if any(values):
                table.add_row(name, *(f"{value / 1e9:.2f} GB" for value in values))
        console = Console(highlight=False)
        console.print(f"{title}, tp={self.plan.tp} pp={self.plan.pp}", markup=False, soft_wrap=True)
        console.print(table)
        console.print("A stage's first GPU, which has the most; activations are an estimate.", soft_wrap=True)
        if self.gpu is not None:
            console.print(f"\n{self.plan.gpus} x {self.gpu.title}", soft_wrap=True)
            console.print(self._times_table())
            assumed = ", ".join(f"{name} {value:g}" for name, value in _ASSUMED.items())
            console.print(f"Assumed, not measured: {assumed}.", soft_wrap=True)
            console.print(self._verdict(self.gpu), soft_wrap=True)

    def _memory_rows(self, stages: list[GpuMemory]) -> Iterator[tuple[str, list[int]]]:
        yield "weights of the LLM", [stage.weights for stage in stages]
        yield "vision encoder, image cache", [stage.vision_encoder for stage in stages]
        yield "prompt table", [stage.prompt_table for stage in stages]
        yield "activations", [stage.activations for stage in stages]
        yield "KV cache per request", [stage.kv_per_request for stage in stages]
        yield "cross-attention cache per request", [stage.cross_kv_per_request for stage in stages]
        yield f"in all, {self.slots} requests", [stage.total(self.slots) for stage in stages]

    def _times_table(self) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD)
        for column in ("", "time", "products", "memory", "messages"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for name, time in self.times.items():
            parts = (time.seconds, time.products, time.memory, time.communication)
            table.add_row(name, *(f"{1e3 * part:.2f} ms" for part in parts))
        return table

    def _verdict(self, gpu: Gpu) -> str:
        """Say in one line whether the engine fits, and if not, what does."""
        of = f"{self.share:g} of {gpu.memory.value / 1e9:g} GB"
        assert self.requests is not None
        if self.requests >= 1:
            return f"Fits in {of} per GPU, with {self.requests} requests of max_seq_len at once"
        most = max(stage.total(1) for stage in self.plan.stages)
        if not self.choices:
            return f"Does not fit: {most / 1e9:.1f} GB with one request, {of} per GPU; no fleet of this GPU holds it"
        named = "; ".join(
            f"{choice.precision} --tp {choice.tp} --pp {choice.pp} ({choice.requests} requests)"
            for choice in self.choices
        )
        return f"Does not fit: {most / 1e9:.1f} GB with one request, {of} per GPU; these do: {named}"


_ASSUMED = {
    "compute efficiency": fleet_times.COMPUTE_EFFICIENCY,
    "memory efficiency": fleet_times.MEMORY_EFFICIENCY,
    "link efficiency": fleet_times.LINK_EFFICIENCY,
    "seconds per message": fleet_times.MESSAGE_SECONDS,
}


def _shown_stages(stages: tuple[GpuMemory, ...]) -> list[GpuMemory]:
    """Return the first and the last stage, and of those between, which are alike but for cross-attention blocks, the
    largest."""
    between = sorted(stages[1:-1], key=lambda stage: stage.total(1))[-1:]
    return [*stages[:1], *between, *(stages[-1:] if len(stages) > 1 else ())]
