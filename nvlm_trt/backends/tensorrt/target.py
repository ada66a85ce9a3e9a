"""Finds this machine's TensorRT and GPU, and says what to do if one is missing or an engine needs another one.

A plan runs only on the TensorRT version and the compute capability that it was built for, so the manifest has both.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from nvlm_trt.backends.plans.gpu import MEANWHILE, import_torch
from nvlm_trt.backends.tensorrt.record import record_of
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError

OLDEST = (11, 0)  # the first with TRT_Attention and TRT_KVCacheUpdate
# NVIDIA's tritonserver container by the major and minor version of its TensorRT.
_CONTAINERS = {"10.16": "26.05", "11.0": "26.06", "11.1": "26.07", "11.2": "26.08"}


@dataclass(frozen=True)
class Target:
    """The TensorRT and the GPU that plans are built for."""

    tensorrt: str
    capability: int  # 90 for 9.0
    gpu: str

    @property
    def container(self) -> str:
        """Return the container that has this TensorRT."""
        return container_with(self.tensorrt)


def import_tensorrt() -> Any:
    """Import tensorrt. Raises EngineError, saying how to get TensorRT, if it is missing or too old."""
    install = (
        f"run in {container_with('11.1')}, or on a GPU machine "
        "`pip install --extra-index-url https://pypi.nvidia.com 'nvlm-trt[tensorrt]'`"
    )
    try:
        import tensorrt
    except ImportError as error:
        raise EngineError(f"TensorRT cannot be imported ({error}); {install}; {MEANWHILE}") from None
    if tuple(map(int, tensorrt.__version__.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise EngineError(f"TensorRT {tensorrt.__version__} is older than {oldest}; {install}; {MEANWHILE}")
    return tensorrt


def find_target(device: str = "cuda") -> Target:
    """Find the TensorRT and the GPU of this machine. Raises EngineError if one is missing."""
    tensorrt, torch = import_tensorrt(), import_torch()
    major, minor = torch.cuda.get_device_capability(device)
    return Target(tensorrt.__version__, 10 * major + minor, torch.cuda.get_device_name(device))


def container_with(version: str) -> str:
    """Return NVIDIA's container with TensorRT `version`: for an unknown version, the container of this process, if the
    environment names it."""
    short = ".".join(version.split(".")[:2])
    release = os.environ.get("NVIDIA_TRITON_SERVER_VERSION") if short not in _CONTAINERS else None
    release = release or _CONTAINERS.get(short)
    return (
        f"nvcr.io/nvidia/tritonserver:{release}-py3" if release else f"a tritonserver container with TensorRT {short}"
    )


def check_target(engine: Engine, target: Target) -> None:
    """Raise EngineError, naming both, if the engine was built with another TensorRT or for another GPU."""
    record = record_of(engine)
    if record.version != target.tensorrt:
        raise EngineError(
            f"engine {engine.path} was built with TensorRT {record.version}, this is {target.tensorrt}; run it in "
            f"{record.container}, or rebuild it here"
        )
    if record.capability != target.capability:
        raise EngineError(
            f"engine {engine.path} was built for compute capability {_dotted(record.capability)} ({record.gpu}), this "
            f"GPU has {_dotted(target.capability)} ({target.gpu}); rebuild it on this machine, in {record.container}"
        )


def _dotted(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"
