"""Computes what a build takes: bytes on disk, host memory, and the bytes that it moves.

A build reads the checkpoint once to hash it and once for each engine that it writes, and reads each engine back to hash
it. Quantised builds write two more: one that observes the inputs of linear layers, if a calibration is measured, and
the unquantised engine of the accuracy gate.
"""

from __future__ import annotations

from dataclasses import dataclass

from nvlm_trt.model.precision import needs_calibration, quantised_components
from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.planner.disk import disk_of_build
from nvlm_trt.planner.memory import EnginePlan, plan_engine

_OBSERVED = 4  # bytes of a parameter in the observing engine, in float32
# Of a build whose smoke test runs a layer at a time, at the widths of 72B: `python -m lab.build_in_little_memory`
_BY_LAYERS = 2_000_000_000


@dataclass(frozen=True)
class BuildCost:
    """Counts bytes. The time of samples (calibration, gate) and of a builder's search for kernels is not counted."""

    engine: int  # of the engine's files
    temporary: int  # on disk beside the finished files, at most
    host_memory: int
    least_host_memory: int  # without a gate: the smoke test runs a layer at a time where the engine does not fit
    device_memory: int  # 0: the engine runs on the host
    moved: int  # read and written

    @property
    def disk(self) -> int:
        return self.engine + self.temporary

    def seconds(self, bandwidth: float) -> float:
        """Compute the least time at `bandwidth` bytes per second of the disk, or of the conversion if it is slower."""
        return self.moved / bandwidth


def build_cost(design: EngineDesign, plan: EnginePlan) -> BuildCost:
    """Compute the cost of building `design`, of which `plan` is the plan."""
    memory = design.backend.memory
    engine = _files(plan)
    sizes = [engine]
    is_quantised, calibrates = bool(quantised_components(design.precisions)), needs_calibration(design.precisions)
    if is_quantised:
        sizes.append(_files(plan_engine(design.unquantised)))
    engines, written = len(sizes), sum(size * (2 if memory.graphs_first else 1) for size in sizes)
    if calibrates:
        engines, written = engines + 1, written + _OBSERVED * sum(plan.parameters.values())
    unquantised = design.unquantised.precisions if is_quantised else None
    disk = disk_of_build(design, calibrates=calibrates, unquantised=unquantised)
    on_host = memory.device == "host"
    host_memory = plan.peak_building if on_host else plan.host_building
    return BuildCost(
        engine=engine,
        temporary=disk - engine,
        host_memory=host_memory,
        least_host_memory=min(host_memory, _BY_LAYERS) if on_host else host_memory,
        device_memory=0 if on_host else plan.peak_building,
        moved=(1 + engines) * plan.checkpoint + 2 * written,
    )


def _files(plan: EnginePlan) -> int:
    return sum(plan.weights.values())
