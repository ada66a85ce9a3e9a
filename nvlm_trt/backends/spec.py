"""Everything that differs between backends, in one object per backend: `BackendSpec`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvlm_trt.model.precision import PrecisionTable

if TYPE_CHECKING:
    from nvlm_trt.backends.base import StepBackend
    from nvlm_trt.builders.engine_build import BuildJob, BuildSteps
    from nvlm_trt.engine import Engine
    from nvlm_trt.limits import EngineLimits
    from nvlm_trt.model.config import NvlmConfig
    from nvlm_trt.runtime.text_generator import GeneratorOptions, TextGenerator


@dataclass(frozen=True)
class MemoryModel:
    """How a backend holds and runs the stages of an engine, for the planner."""

    device: str  # "host" or "gpu": where weights, caches and activations are
    encode_tiles: int | None = None  # tiles that are encoded at once; None: all tiles of an image
    # precision in the engine's files -> the one that the loaded weights have, where that is another
    loaded_as: Mapping[str, str] = field(default_factory=dict)
    # (bytes of the largest stage's weights, parameters, whether it is calibrated) -> host memory that a build takes
    # beside the engine that it tries
    host_building: Callable[[int, int, bool], int] = lambda largest, parameters, calibrated: 0


@dataclass(frozen=True)
class TritonPlacement:
    """How Triton runs an engine: what the model repository says of it."""

    vision_model: str = "vision_encoder"  # the folder of triton_repo that serves the vision encoder
    image_type: str = "TYPE_FP32"  # of tiles and image tokens
    decoder_kind: str = "KIND_CPU"
    graph_specs: str = ""  # CUDA graphs of the vision encoder
    max_tiles: int | None = None  # that the vision encoder takes at once; None: what batching asks for
    files: Mapping[str, Path] = field(default_factory=dict)  # linked into the vision model's version folder
    needs_backend: str | None = None  # of tritonserver
    remedy: str = ""  # where there is a tritonserver that has it


@dataclass(frozen=True)
class OpenOptions:
    """How an engine is opened."""

    threads: int | None = None  # of each stage on a CPU; None: all cores that this process may use
    device: str | None = None  # "cpu", "cuda", "cuda:1"; None: the backend's own


@dataclass(frozen=True)
class BackendSpec:
    """One backend. Its functions import the runtime when they are called, not before.

    A backend runs steps (`open`), which the batcher turns into a text generator, or batches by itself
    (`open_generator`)."""

    name: str
    summary: str  # completes "runs the engine: ..." in --help
    device: str  # the kind of device it runs on: "cpu" or "cuda"
    precisions: PrecisionTable
    prefill_chunk: int  # prompt tokens between two decoding steps, and the most that are run at once
    memory: MemoryModel
    probe: Callable[[], str]  # the runtime's name and version; raises EngineError that says how to get it
    build: Callable[[BuildJob], BuildSteps]  # raises EngineError where it cannot build
    open: Callable[[Engine, Collection[str], OpenOptions], StepBackend] | None = None  # some of STAGES
    open_generator: Callable[[Engine, OpenOptions, GeneratorOptions], TextGenerator] | None = None
    build_options: Mapping[str, Any] = field(default_factory=dict)  # option of `nvlm-trt build` -> its default
    # both raise EngineError; of options and limits that are fine one by one
    check_options: Callable[[Mapping[str, Any]], None] = lambda options: None
    check_limits: Callable[[NvlmConfig, EngineLimits, Mapping[str, str]], None] = lambda config, limits, chosen: None
    placement: Callable[[Engine], TritonPlacement] = lambda engine: TritonPlacement()
