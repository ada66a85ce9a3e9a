"""Renders the model repository that tritonserver loads for one engine."""

from __future__ import annotations

import importlib.resources
import json
import os
import shutil
import string
from dataclasses import dataclass, field
from pathlib import Path

from nvlm_trt.backends.tensorrt.placement import link_plan, most_tiles, placement
from nvlm_trt.engine import Engine
from nvlm_trt.errors import ServerError
from nvlm_trt.image.decoding import ImageLimits
from nvlm_trt.machine import available_cores

# Images of several requests on their way through the ensemble at once. Each holds one of the threads that the python
# backend also needs to answer, so there must be fewer than of those: with all of them held nothing is ever answered.
ENCODE_WORKERS = 8
BACKEND_THREADS = 64

# Full images whose tiles may be merged into one batch: beyond that a request waits longer than batching saves.
_BATCHED_IMAGES = 4
_BATCHING_DELAY_US = 1000
_MAX_TILING_INSTANCES = 4

_SHARED_MEMORY = Path("/dev/shm")
_SHARED_MEMORY_SLACK = 32 << 20


@dataclass(frozen=True)
class RepositoryOptions:
    threads: int | None = None  # of the encoder and of the decoder each; None: the cores at hand
    max_queue: int = 64  # requests that wait for a slot; more are rejected
    image_limits: ImageLimits = field(default_factory=ImageLimits)


def render_repository(engine: Engine, directory: Path, drain_file: Path, options: RepositoryOptions) -> None:
    """Write the models into `directory`, made for it. While `drain_file` exists, `nvlm` accepts no new request.

    Raises ServerError for an engine whose plans Triton cannot load."""
    values = _template_values(engine, drain_file, options)
    for name, model in _sources(engine.manifest.backend).items():
        target = directory / name
        (target / "1").mkdir(parents=True)
        template = string.Template((model / "config.pbtxt").read_text(encoding="utf-8"))
        (target / "config.pbtxt").write_text(template.substitute(values), encoding="utf-8")
        for source in (model / "1").glob("*.py"):
            shutil.copy(source, target / "1")
    if engine.manifest.backend == "tensorrt":
        link_plan(engine, directory / "vision_encoder" / "1")


def max_batch_tiles(engine: Engine) -> int:
    """Tiles that vision_encoder takes at once: some images of the most tiles, thumbnails included; for TensorRT what
    its plan was built for."""
    if engine.manifest.tensorrt:
        return most_tiles(engine.manifest.tensorrt)
    most = engine.limits.max_tiles
    return _BATCHED_IMAGES * (most + (most > 1))


def _template_values(engine: Engine, drain_file: Path, options: RepositoryOptions) -> dict[str, str]:
    cores = available_cores()
    config, limits = engine.config, options.image_limits
    return {
        # a JSON string is a protobuf text string, quotes and escapes included
        "engine": json.dumps(str(engine.path.absolute()), ensure_ascii=False),
        "drain_file": json.dumps(str(drain_file), ensure_ascii=False),
        **placement(engine),
        "tile_size": str(config.vision.image_size),
        "tokens_per_tile": str(config.tokens_per_tile),
        "hidden_size": str(config.llm.hidden_size),
        "max_tiles": str(engine.limits.max_tiles),
        "max_batch_tiles": str(max_batch_tiles(engine)),
        "batching_delay_us": str(_BATCHING_DELAY_US),
        # an image is decoded and resized on one core; half of them are left to the encoder and the decoder
        "tiling_instances": str(max(1, min(_MAX_TILING_INSTANCES, cores // 2))),
        "threads": str(options.threads or cores),
        "max_queue": str(options.max_queue),
        "encode_workers": str(ENCODE_WORKERS),
        "max_pixels": str(limits.max_pixels),
        "max_bytes": str(limits.max_bytes),
        "max_images": str(limits.max_images),
    }


def _sources(backend: str) -> dict[str, Path]:
    """Model -> its folder in triton_repo, in a checkout or in an installed wheel. A folder that ends in the name of a
    backend has that model for it."""
    root = Path(str(importlib.resources.files("nvlm_trt.triton_repo")))
    folders = {folder.name: folder for folder in root.iterdir() if (folder / "config.pbtxt").is_file()}
    special = {name: folder for name, folder in folders.items() if name.endswith("_tensorrt")}
    models = {name: folder for name, folder in folders.items() if name not in special}
    if backend == "tensorrt":
        models |= {name.removesuffix("_tensorrt"): folder for name, folder in special.items()}
    return models


def check_shared_memory(engine: Engine) -> None:
    """Raise ServerError if the models could not pass each other full batches of tiles."""
    tile_bytes = 3 * engine.config.vision.image_size**2 * 4
    needed = 3 * max_batch_tiles(engine) * tile_bytes + _SHARED_MEMORY_SLACK
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return
    free = status.f_bavail * status.f_frsize
    if free < needed:
        raise ServerError(
            f"{_SHARED_MEMORY} has {free >> 20} MiB free, Triton's models need about {needed >> 20} MiB to pass tiles "
            "on; enlarge it (docker run --shm-size=1g)"
        )
