"""Loads plans of TensorRT-RTX: asks first whether a plan runs here, and keeps the kernels that its first run compiles.

Nothing here has run on a GPU (docs/tensorrt.md).
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

from nvlm_trt.backends.plans.gpu import import_torch
from nvlm_trt.backends.plans.runtime import deserialise
from nvlm_trt.backends.tensorrt_rtx.record import RtxRecord
from nvlm_trt.backends.tensorrt_rtx.target import TARGETS, import_rtx, names_of
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError


class RtxRuntime:
    """Implements `PlanRuntime` for one engine.

    TensorRT-RTX compiles kernels when a plan first runs (JIT). A runtime cache for each plan keeps them in the user's
    cache folder. TensorRT-RTX refuses a cache of another GPU, version or newer driver, and `close` then replaces it."""

    def __init__(self, engine: Engine, record: RtxRecord, device: str) -> None:
        """Raises EngineError without TensorRT-RTX or a GPU, and for an engine of another version."""
        self.trt, self.torch = import_rtx(), import_torch()
        self._path, self._files, self._record, self._device = engine.path, engine.manifest.files, record, device
        if record.version != self.trt.__version__:
            raise EngineError(
                f"engine {engine.path} was built with TensorRT-RTX {record.version}, this is {self.trt.__version__}; "
                f"rebuild it here, or install tensorrt_rtx_cu13_libs=={record.version} and "
                f"tensorrt_rtx_cu13_bindings=={record.version}"
            )
        self._logger = self.trt.Logger(self.trt.Logger.ERROR)
        self._runtime = self.trt.Runtime(self._logger)
        self._configs: dict[int, Any] = {}  # by id of the ICudaEngine
        self._caches: list[tuple[Path, Any]] = []

    def load(self, plan: Path) -> Any:
        self._check_validity(plan)
        engine = deserialise(self._runtime, plan)
        if self._record.weight_streaming:
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        self._configs[id(engine)] = self._configure(engine, plan)
        return engine

    def create_context(self, engine: Any) -> Any | None:
        return engine.create_execution_context(self._configs[id(engine)])

    def can_capture(self, context: Any, stream: Any) -> bool:
        return bool(context.is_stream_capturable(stream.cuda_stream))

    def close(self) -> None:
        """Write the runtime caches. A cache that cannot be written costs the next start its compilation, no more."""
        self._configs.clear()
        for path, cache in self._caches:
            temporary = path.with_name(f"{path.name}.{os.getpid()}")
            with contextlib.suppress(OSError):
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    temporary.write_bytes(memoryview(cache.serialize()))
                    os.replace(temporary, path)
                finally:
                    temporary.unlink(missing_ok=True)
        self._caches.clear()

    def _check_validity(self, plan: Path) -> None:
        """Raise EngineError, which names GPU, targets and what to rebuild, if TensorRT-RTX says the plan is invalid."""
        with plan.open("rb") as file:
            header = file.read(self._runtime.engine_header_size)
        validity, diagnostics = self._runtime.get_engine_validity(header)
        if validity != self.trt.EngineValidity.INVALID:
            return
        reasons = self.trt.EngineInvalidityDiagnostics.__members__.values()
        given = [reason.name.lower().replace("_", " ") for reason in reasons if int(reason) & diagnostics]
        major, minor = self.torch.cuda.get_device_capability(self._device)
        target = f"sm{major}{minor}"
        remedy = f"--target {target}" if target in TARGETS else "--backend tensorrt, which knows this GPU"
        raise EngineError(
            f"engine file {plan} does not run on this GPU ({self.torch.cuda.get_device_name(self._device)}, compute "
            f"capability {major}.{minor}): {', '.join(given) or 'no reason given'}; it was built for "
            f"{names_of(self._record.targets)}; rebuild it with {remedy}"
        )

    def _configure(self, engine: Any, plan: Path) -> Any:
        """Return the IRuntimeConfig of a plan's contexts."""
        trt = self.trt
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # the kernels of a shape are compiled before its first run: a CUDA graph must not record fallback kernels
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # `LoadedPlan` records decoding steps itself
        path = self._cache_path(plan)
        cache = config.create_runtime_cache()
        with contextlib.suppress(OSError):  # there is none, or it cannot be read
            cache.deserialize(path.read_bytes())
        config.set_runtime_cache(cache)
        self._caches.append((path, cache))
        return config

    def _cache_path(self, plan: Path) -> Path:
        """Name the runtime cache of a plan by GPU, driver, version of TensorRT-RTX and the plan's hash."""
        gpu, driver = self.torch.cuda.get_device_name(self._device), driver_version()
        parts = f"{gpu}-driver{driver}-rtx{self.trt.__version__}-{self._files[plan.name].sha256[:16]}"
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        return cache / "nvlm-trt" / f"{re.sub('[^A-Za-z0-9._]+', '-', parts)}.kernels"


def driver_version() -> str:
    """Return the version of NVIDIA's driver, "unknown" where the kernel does not tell."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    match = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", text)
    return match.group(1) if match else "unknown"
