"""Renders the model repository that tritonserver loads for one engine."""

from __future__ import annotations

import importlib.resources
import json
import shutil
import string
from dataclasses import dataclass, field
from pathlib import Path

from nvlm_trt.backends.opening import backend_of
from nvlm_trt.backends.spec import TritonPlacement
from nvlm_trt.engine import Engine
from nvlm_trt.errors import ServerError
from nvlm_trt.image.decoder import default_workers
from nvlm_trt.image.decoding import ImageLimits
from nvlm_trt.machine import available_cores
from nvlm_trt.serving.chat_tensors import PACKED_ONLY
from nvlm_trt.serving.served_record import ServedRecord

# Images whose tiles are sent through the ensemble at once. Each blocks one of the python backend's threads, which also
# answer requests: there must be fewer images than threads, or no request is ever answered.
ENCODE_WORKERS = 8
BACKEND_THREADS = 64

# Images with the most tiles that fit into one batch. With more, a request waits longer than batching saves.
_BATCHED_IMAGES = 4
_BATCHING_DELAY_US = 1000

ENGINE_LINK = "engine"  # to the engine directory, in the directory that the server runs in
_VERSIONS = {"tiling": ("1", PACKED_ONLY)}  # of one code; other models have version 1
_VISION_ENCODER = "vision_encoder"  # the name of the model; its folder in triton_repo may have another name


@dataclass(frozen=True)
class RepositoryOptions:
    threads: int | None = None  # CPU threads of the encoder, and of the decoder; None: all usable cores
    encoder_niceness: int = 0  # of the vision encoder's process: higher leaves the cores to the decoder
    max_queue: int = 64  # most requests that wait for a slot; more are rejected
    reuse_prompts: bool = True  # as in GeneratorOptions
    image_limits: ImageLimits = field(default_factory=ImageLimits)


def placement_of(engine: Engine) -> TritonPlacement:
    """Return how Triton runs the stages of an engine. Raises ServerError for an engine that Triton cannot run."""
    return backend_of(engine, "vision_encoder").placement(engine)


def render_repository(
    engine: Engine, placement: TritonPlacement, directory: Path, drain_descriptor: int, options: RepositoryOptions
) -> None:
    """Write the models into the empty `directory`. `nvlm` inherits `drain_descriptor`, the model's end of a
    DrainChannel."""
    values = _template_values(engine, placement, drain_descriptor, options)
    for name, model in _sources(placement.vision_model).items():
        template = string.Template((model / "config.pbtxt").read_text(encoding="utf-8"))
        for version in _VERSIONS.get(name, ("1",)):
            folder = directory / name / version
            folder.mkdir(parents=True)
            for source in (model / "1").glob("*.py"):
                shutil.copy(source, folder)
        (directory / name / "config.pbtxt").write_text(template.substitute(values), encoding="utf-8")
    for name, file in placement.files.items():
        (directory / _VISION_ENCODER / "1" / name).symlink_to(file)


def max_batch_tiles(engine: Engine, placement: TritonPlacement) -> int:
    """Return the largest batch of vision_encoder, in tiles: the backend's, or some images with the most tiles."""
    return placement.max_tiles or _BATCHED_IMAGES * engine.limits.tiles_per_image


def check_backend(engine: Engine, placement: TritonPlacement, backends: Path) -> None:
    """Raise ServerError if the folder `backends` of this tritonserver lacks the backend of the vision encoder."""
    if placement.needs_backend and not (backends / placement.needs_backend).is_dir():
        raise ServerError(
            f"engine {engine.path} needs Triton's backend {placement.needs_backend}, which this tritonserver lacks "
            f"({backends}); {placement.remedy}"
        )


def _template_values(
    engine: Engine, placement: TritonPlacement, drain_descriptor: int, options: RepositoryOptions
) -> dict[str, str]:
    cores = available_cores()
    config, limits = engine.config, options.image_limits
    return {
        # a JSON string is a protobuf text string, quotes and escapes included
        "engine": json.dumps(str(engine.path.absolute()), ensure_ascii=False, allow_nan=False),
        "engine_link": ENGINE_LINK,
        "engine_fingerprint": engine.fingerprint,
        "engine_record": json.dumps(ServedRecord.of(engine).to_json(), ensure_ascii=False, allow_nan=False),
        "drain_descriptor": str(drain_descriptor),
        "image_type": placement.image_type,
        "decoder_kind": placement.decoder_kind,
        "cpu_only_inputs": "no" if placement.decoder_kind == "KIND_GPU" else "yes",
        "graph_specs": placement.graph_specs,
        "tile_size": str(config.vision.image_size),
        "tokens_per_tile": str(config.tokens_per_tile),
        "hidden_size": str(config.llm.hidden_size),
        "max_tiles": str(engine.limits.max_tiles),
        "max_batch_tiles": str(max_batch_tiles(engine, placement)),
        "batching_delay_us": str(_BATCHING_DELAY_US),
        # of nvlm; the instances of tiling, which decode one image each, are as many
        "decode_workers": str(default_workers()),
        "threads": str(options.threads or cores),
        "encoder_niceness": str(options.encoder_niceness),
        "max_queue": str(options.max_queue),
        "reuse_prompts": "yes" if options.reuse_prompts else "no",
        "encode_workers": str(ENCODE_WORKERS),
        "max_pixels": str(limits.max_pixels),
        "max_bytes": str(limits.max_bytes),
        "max_images": str(limits.max_images),
        "max_decode_seconds": str(limits.max_decode_seconds),
        "max_decode_memory": str(limits.max_decode_memory),
    }


def _sources(vision_model: str) -> dict[str, Path]:
    """Return model -> its folder in triton_repo, in a checkout or in an installed wheel."""
    root = Path(str(importlib.resources.files("nvlm_trt.triton_repo")))
    folders = {folder.name: folder for folder in root.iterdir() if (folder / "config.pbtxt").is_file()}
    models = {name: folder for name, folder in folders.items() if not name.startswith(_VISION_ENCODER)}
    return {**models, _VISION_ENCODER: folders[vision_model]}
