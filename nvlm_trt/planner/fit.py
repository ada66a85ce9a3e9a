"""Decides how many slots of an engine fit in the memory of one device, and what to change if not all do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.planner.gpus import GPUS, Gpu, refused
from nvlm_trt.planner.memory import EnginePlan, plan_engine

_TOKENS = 128  # a context that is proposed is a multiple
_LEAST_CONTEXT = 256


@dataclass(frozen=True)
class Fit:
    """Compares an engine with a device."""

    memory: float  # bytes of the device
    share: float  # of them for the engine
    fixed: int  # bytes of the engine without its slots
    per_slot: int  # bytes of the caches of one slot
    slots: int  # that fit; negative: not even the rest fits
    wanted: int
    changes: tuple[str, ...]  # options of `nvlm-trt plan`, each of which alone makes the wanted slots fit

    @property
    def fits(self) -> bool:
        return self.slots >= self.wanted


def find_fit(design: EngineDesign, memory: float, share: float, gpu: Gpu | None = None) -> Fit:
    """Count the slots of `design` that fit in `share` of a device's `memory` bytes; `gpu`: what the device is."""
    plan, wanted = plan_engine(design), design.limits.max_slots
    fixed, per_slot = _parts(plan, wanted)
    slots = int((share * memory - fixed) // per_slot)
    changes = () if slots >= wanted else tuple(_changes(design, plan, memory, share, gpu, slots))
    return Fit(memory, share, fixed, per_slot, slots, wanted, changes)


def _parts(plan: EnginePlan, slots: int) -> tuple[int, int]:
    caches = plan.self_cache + plan.cross_cache
    return plan.peak_running - caches, caches // slots


def _changes(
    design: EngineDesign, plan: EnginePlan, memory: float, share: float, gpu: Gpu | None, slots: int
) -> Iterator[str]:
    if slots >= 1:
        yield f"--concurrency {slots}"
    limits, (fixed, _) = design.limits, _parts(plan, design.limits.max_slots)
    token = plan.self_cache / limits.max_seq_len  # of all slots
    context = int((share * memory - fixed - plan.cross_cache) / token) // _TOKENS * _TOKENS
    if context >= _LEAST_CONTEXT:
        yield f"--context {context}"
    table = design.backend.precisions
    for name in table.names:
        other = design.with_precisions(table.parse(name))
        if gpu and refused(gpu, other.precisions, split=False, crosses=bool(design.config.cross_layers)):
            continue
        if plan_engine(other).peak_running <= share * memory:
            yield f"--precision {name}"
    if gpu:
        for larger in sorted(GPUS.values(), key=lambda other: other.memory.value):
            crosses = bool(design.config.cross_layers)
            if plan.peak_running <= share * larger.memory.value and not refused(
                larger, design.precisions, split=False, crosses=crosses
            ):
                yield f"--gpu {larger.name}"
                break
