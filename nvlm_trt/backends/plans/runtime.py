"""Defines in what the runtimes of TensorRT and TensorRT-RTX differ when a plan is loaded and run."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any, Protocol

from nvlm_trt.errors import EngineError


class PlanRuntime(Protocol):
    """Loads plans and makes their execution contexts. Tensors are torch's, on the GPU."""

    trt: Any  # the module of the runtime's classes
    torch: Any

    def load(self, plan: Path) -> Any:
        """Return the deserialised plan, an ICudaEngine. Raises EngineError if the plan cannot run here."""
        ...

    def create_context(self, engine: Any) -> Any | None:
        """Return an execution context whose working memory the caller provides; None without memory."""
        ...

    def can_capture(self, context: Any, stream: Any) -> bool:
        """Return whether a run of `context`, whose tensors are bound, can be recorded as a CUDA graph."""
        ...

    def close(self) -> None:
        """Free what `load` and `create_context` share, after the plans are closed."""
        ...


def deserialise(runtime: Any, plan: Path) -> Any:
    """Return the ICudaEngine of a plan. `runtime`, an IRuntime, has to outlive it.

    Raises EngineError if the runtime refuses the plan."""
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise EngineError(
            f"engine file {plan} cannot be loaded by TensorRT (damaged, or out of GPU memory: see above); free the "
            "GPU, or rebuild the engine with `nvlm-trt build`"
        )
    return engine
