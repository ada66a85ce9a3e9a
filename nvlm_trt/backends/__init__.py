"""Opens an engine with the backend that it was built for."""

from __future__ import annotations

import os
from collections.abc import Collection

from nvlm_trt.backends.base import COMPONENTS, Backend
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError

# ONNX Runtime 1.32 keeps a telemetry session file unless told not to before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def open_backend(
    engine: Engine,
    components: Collection[str] = COMPONENTS,
    threads: int | None = None,
    device: str = "cpu",
) -> Backend:
    """Load the named components of an engine; the others' methods may not be called. Close it, or use `with`.

    `threads` per component; None: all cores that this process may use.
    Raises EngineError when a component cannot be loaded or the backend or device is not known."""
    if engine.manifest.backend != "onnxruntime":
        raise EngineError(
            f"engine {engine.path} was built for the backend {engine.manifest.backend!r}, which this nvlm-trt does "
            "not have; rebuild it with `nvlm-trt build`"
        )
    if device != "cpu":
        raise EngineError(f"engine {engine.path} runs on the device 'cpu', not on {device!r}; open it with 'cpu'")
    from nvlm_trt.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(engine, components, threads)
