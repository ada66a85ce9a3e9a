"""Opens an engine with the backend that it was built for."""

from __future__ import annotations

import os
from collections.abc import Collection

from nvlm_trt.backends.base import COMPONENTS, Backend
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError

# ONNX Runtime 1.32 keeps a telemetry session file unless told not to before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_DEVICES = {"onnxruntime": "cpu", "tensorrt": "cuda"}  # backend -> where it runs


def open_backend(
    engine: Engine,
    components: Collection[str] = COMPONENTS,
    threads: int | None = None,
    device: str | None = None,
) -> Backend:
    """Load the named components of an engine; the others' methods may not be called. Close it, or use `with`.

    `threads` per component on a CPU; None: all cores that this process may use. `device`: "cpu", or "cuda" or "cuda:1"
    for TensorRT; None: what the engine was built for.
    Raises EngineError when a component cannot be loaded or the backend or device is not known."""
    backend = engine.manifest.backend
    if backend not in _DEVICES:
        raise EngineError(
            f"engine {engine.path} was built for the backend {backend!r}, which this nvlm-trt does not have; rebuild "
            "it with `nvlm-trt build`"
        )
    device = device or _DEVICES[backend]
    if device.split(":")[0] != _DEVICES[backend]:
        raise EngineError(
            f"engine {engine.path} runs on the device {_DEVICES[backend]!r}, not on {device!r}; open it with "
            f"{_DEVICES[backend]!r}"
        )
    if backend == "tensorrt":
        from nvlm_trt.backends.tensorrt.backend import TensorRtBackend

        return TensorRtBackend(engine, components, device)
    from nvlm_trt.backends.onnxruntime.backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend(engine, components, threads)
