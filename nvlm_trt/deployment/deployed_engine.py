"""Reads from an engine's manifest what a deployment must know: its container, its ranks, its memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from nvlm_trt.backends.opening import backend_of
from nvlm_trt.backends.spec import ServerNeeds
from nvlm_trt.engine import Engine
from nvlm_trt.image.image_limits import ImageLimits
from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.planner.memory import plan_engine
from nvlm_trt.serving.triton.repository import placement_of
from nvlm_trt.serving.triton.shared_memory import SharedMemory

_GIB = 1 << 30
# nvlm, vision_encoder, and both versions of tiling: each has a region of shared memory of its own
_PYTHON_MODELS = 4
_NCCL_SHARED_MEMORY = _GIB  # between the ranks of a node
_SERVER_MEMORY = 4 * _GIB  # estimate: tritonserver, Python, the image cache, images that wait
_MOST_TAG = 4  # tokens of an NVLM-H tile tag, which no manifest has


@dataclass(frozen=True)
class DeployedEngine:
    """Describes an engine as far as a deployment differs by it."""

    name: str  # a DNS label
    model: str
    backend: str
    fingerprint: str
    path: Path
    nbytes: int  # of its files
    needs: ServerNeeds
    on_gpu: bool
    slots: int
    shared_memory: int  # bytes of /dev/shm
    host_memory: int  # bytes, shared memory included; an estimate

    @classmethod
    def of(cls, engine: Engine) -> DeployedEngine:
        """Describe a published engine. Raises EngineError for one that cannot be served."""
        manifest = engine.manifest
        spec = backend_of(engine)
        needs = spec.server_needs(engine)
        placement = placement_of(engine)
        shared = _PYTHON_MODELS * SharedMemory(engine, placement, ImageLimits()).most_per_model
        shared += _NCCL_SHARED_MEMORY if needs.tp * needs.pp > 1 else 0
        devices = {spec.memory.device, backend_of(engine, "vision_encoder").memory.device}
        plan = plan_engine(EngineDesign.of(engine, _MOST_TAG))
        weights = plan.peak_running if "host" in devices else 0
        return cls(
            name=_label(manifest.model_name),
            model=manifest.model_name,
            backend=manifest.backend,
            fingerprint=engine.fingerprint,
            path=engine.path.absolute(),
            nbytes=sum(file.size for file in manifest.files.values()),
            needs=needs,
            on_gpu="gpu" in devices,
            slots=engine.limits.max_slots,
            shared_memory=_whole_gib(shared),
            host_memory=_whole_gib(shared + weights + _SERVER_MEMORY),
        )

    @property
    def ranks(self) -> int:
        """Count the processes that run the engine together, each with a GPU of its own."""
        return self.needs.tp * self.needs.pp


def _label(name: str) -> str:
    """Make a DNS label of a model's name: letters, digits and single hyphens, at most 40 of them."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-")
    return label if label[:1].isalpha() else f"nvlm-{label}".strip("-")


def _whole_gib(nbytes: int) -> int:
    return -(-nbytes // _GIB) * _GIB
