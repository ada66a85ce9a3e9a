"""Checks, before a build writes anything, that this machine holds the engines of the accuracy gate."""

from __future__ import annotations

from nvlm_trt.errors import EngineError
from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.planner.memory import plan_engine


def check_gate_memory(design: EngineDesign, unquantised: str, free: int) -> None:
    """Raise EngineError if `free` bytes do not hold `design` or its unquantised engine, which the gate opens
    one after the other. `unquantised` names the precision of the latter. A design for a GPU is not checked."""
    needed = plan_engine(design).peak_building
    if design.backend.memory.device == "host" and needed > free:
        raise EngineError(
            f"the accuracy gate compares with an engine in {unquantised}, which needs {needed / 1e9:.2f} GB of memory, "
            f"and {free / 1e9:.2f} GB are free; leave the gate out with --no-gate and compare with `nvlm-trt eval` on "
            "a larger machine"
        )
