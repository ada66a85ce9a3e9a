"""Shows the part of `nvlm-trt plan` that is about the memory of an engine on several GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nvlm_trt.commands.plan_sections import show_table
from nvlm_trt.errors import NvlmError
from nvlm_trt.model.parallel import pipeline_sizes, tensor_sizes
from nvlm_trt.planner.fleet import Choice, FleetPlan, GpuMemory, fleets, plan_fleet, what_fits

if TYPE_CHECKING:
    from rich.console import Console

    from nvlm_trt.model.config import NvlmConfig
    from nvlm_trt.planner.design import EngineDesign
    from nvlm_trt.planner.gpus import Gpu


@dataclass(frozen=True)
class FleetSection:
    """The memory of each GPU, and with a GPU's data sheet: how many requests fit, and what fits otherwise."""

    plan: FleetPlan
    slots: int
    share: float
    gpu: Gpu | None
    requests: int | None  # of max_seq_len that fit at once
    choices: list[Choice]  # the smallest fleet for each precision, if the asked one does not fit

    @classmethod
    def of(cls, design: EngineDesign, tp: int, pp: int, gpu: Gpu | None, share: float) -> FleetSection:
        plan = plan_fleet(design, tp, pp)
        if gpu is None:
            return cls(plan, design.limits.max_slots, share, None, None, [])
        requests = plan.requests_that_fit(gpu.memory.value, share)
        choices = what_fits(design, gpu, share) if requests < 1 else []
        return cls(plan, design.limits.max_slots, share, gpu, requests, choices)

    @property
    def fits(self) -> bool | None:
        return None if self.requests is None else self.requests >= 1

    def to_dict(self) -> dict[str, Any]:
        stages = [
            {**asdict(stage), "total": stage.total(self.slots), "fixed": stage.fixed} for stage in self.plan.stages
        ]
        return {
            "fleet": {
                "tp": self.plan.tp,
                "pp": self.plan.pp,
                "stages": stages,
                "memory_share": self.share,
                "fits": self.fits,
                "requests_that_fit": None if self.requests is None else max(self.requests, 0),
                "what_fits": [asdict(choice) for choice in self.choices],
            }
        }

    def show(self, console: Console) -> None:
        stages = _shown_stages(self.plan.stages)
        columns = [f"stage {stage.stage}" if len(stages) > 1 else "" for stage in stages]
        rows = [
            (name, *(f"{value / 1e9:.2f} GB" for value in values))
            for name, values in self._memory_rows(stages)
            if any(values)
        ]
        show_table(console, ("bytes on one GPU", *columns), rows)
        console.print("A stage's first GPU, which has the most; activations are an estimate.", soft_wrap=True)
        if self.gpu is not None:
            console.print(self._verdict(self.gpu), soft_wrap=True)

    def _memory_rows(self, stages: list[GpuMemory]) -> Iterator[tuple[str, list[int]]]:
        yield "weights of the LLM", [stage.weights for stage in stages]
        yield "vision encoder, image cache", [stage.vision_encoder for stage in stages]
        yield "prompt table", [stage.prompt_table for stage in stages]
        yield "activations", [stage.activations for stage in stages]
        yield "KV cache per request", [stage.kv_per_request for stage in stages]
        yield "cross-attention cache per request", [stage.cross_kv_per_request for stage in stages]
        yield f"in all, {self.slots} requests", [stage.total(self.slots) for stage in stages]

    def _verdict(self, gpu: Gpu) -> str:
        """Say in one line whether the engine fits, and if not, what does."""
        of = f"{self.share:g} of {gpu.memory.value / 1e9:g} GB"
        assert self.requests is not None
        if self.requests >= 1:
            return (
                f"Fits in {of} per GPU ({self.plan.gpus} x {gpu.title}), with {self.requests} requests of max_seq_len "
                "at once"
            )
        most = max(stage.total(1) for stage in self.plan.stages)
        if not self.choices:
            return f"Does not fit: {most / 1e9:.1f} GB with one request, {of} per GPU; no fleet of this GPU holds it"
        named = "; ".join(
            f"{choice.precision} --tp {choice.tp} --pp {choice.pp} ({choice.requests} requests)"
            for choice in self.choices
        )
        return f"Does not fit: {most / 1e9:.1f} GB with one request, {of} per GPU; these do: {named}"


def choose_split(
    config: NvlmConfig, gpus: int | None, tp: int | None, pp: int | None, gpu: Gpu | None
) -> tuple[int, int]:
    """Return (tp, pp): as given, or the split of `gpus` GPUs with the fewest pipeline stages in which tensor
    parallelism stays in a node. Raises NvlmError if no split has that many GPUs."""
    if tp is not None or pp is not None:
        chosen = tp or 1, pp or 1
        if gpus not in (None, chosen[0] * chosen[1]):
            raise NvlmError(f"--tp {chosen[0]} times --pp {chosen[1]} are not --gpus {gpus}; leave out --gpus")
        return chosen
    if gpus is None:
        return 1, 1
    possible = fleets(config, gpu) if gpu else [(t, p) for p in pipeline_sizes(config) for t in tensor_sizes(config)]
    for split in possible:
        if split[0] * split[1] == gpus:
            return split
    numbers = ", ".join(map(str, sorted({t * p for t, p in possible})[:12]))
    raise NvlmError(f"{gpus} GPUs do not split {config.name} evenly; choose --gpus from {numbers}, or --tp and --pp")


def _shown_stages(stages: tuple[GpuMemory, ...]) -> list[GpuMemory]:
    """Return the first and the last stage, and of those between, which are alike but for cross-attention blocks, the
    largest."""
    between = sorted(stages[1:-1], key=lambda stage: stage.total(1))[-1:]
    return [*stages[:1], *between, *(stages[-1:] if len(stages) > 1 else ())]
