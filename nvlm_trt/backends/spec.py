"""Describes each backend by one object, `BackendSpec`, that holds everything in which backends differ."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvlm_trt.model.precision import PrecisionTable
from nvlm_trt.progress import Progress

if TYPE_CHECKING:
    from nvlm_trt.backends.base import StepBackend
    from nvlm_trt.backends.layers import EngineLayers
    from nvlm_trt.builders.build_steps import BuildJob, BuildSteps
    from nvlm_trt.engine import Engine
    from nvlm_trt.layer_loop import LayerLoop
    from nvlm_trt.limits import EngineLimits
    from nvlm_trt.model.config import NvlmConfig
    from nvlm_trt.prompt.tokenizer import Tokenizer
    from nvlm_trt.runtime.text_generator import GeneratorOptions, TextGenerator


@dataclass(frozen=True)
class StageWeights:
    """Counts a stage's weights."""

    nbytes: int = 0
    in_blocks: int = 0  # bytes, of `nbytes`, of weight-only tensors
    in_blocks_parameters: int = 0  # numbers of the checkpoint that these tensors hold: a tied lm_head has none
    largest_in_blocks: int = 0  # numbers that the largest of these tensors holds

    def __add__(self, other: StageWeights) -> StageWeights:
        return StageWeights(
            self.nbytes + other.nbytes,
            self.in_blocks + other.in_blocks,
            self.in_blocks_parameters + other.in_blocks_parameters,
            max(self.largest_in_blocks, other.largest_in_blocks),
        )


@dataclass(frozen=True)
class Weight:
    """Describes a tensor of an engine's files to a memory model."""

    component: str
    numbers: int
    nbytes: int  # in the file, scales included
    multiplied: bool  # a linear layer's; False: looked up, added, or scaled with
    quantised: bool = False
    tied: bool = False  # an embedding table that lm_head multiplies, too


@dataclass(frozen=True)
class Loaded:
    """Counts the bytes of a tensor that a runtime has loaded."""

    held: int  # for as long as the engine is open
    mapped: int = 0  # pages of the engine's file, which the system may drop and read again


def _copied(weight: Weight) -> Loaded:
    return Loaded(weight.nbytes)


@dataclass(frozen=True)
class EncoderMemory:
    """Tells the planner how another runtime than the backend's holds and runs the vision encoder."""

    load: Callable[[Weight], Loaded]
    read: Callable[[Weight], int]  # bytes of a weight that a run reads
    number_size: int  # bytes of a number between layers
    tiles: int  # that are encoded at once
    overhead: int = 0  # bytes that the runtime takes beside weights and activations


@dataclass(frozen=True)
class MemoryModel:
    """Tells the planner how a backend holds and runs the stages of an engine."""

    device: str  # "host" or "gpu": the memory of weights, caches and activations
    # the type of the caches, and of all numbers in the files that are not quantised; None: the floating-point type
    floating: str | None = None
    encode_tiles: int | None = None  # tiles that are encoded at once; None: all tiles of an image
    # True: every token reads the whole cross-attention cache of its slot; False: the tokens in use
    whole_cross_cache: bool = False
    # True: weight-only precisions are written as DequantizeLinear (builders/quantization/blocked_weights.py)
    standard_blocks: bool = False
    graphs_first: bool = False  # a build writes graphs with all weights, from which it makes the engine
    load: Callable[[Weight], Loaded] = _copied
    overhead: int = 0  # bytes that the runtime takes for a stage, beside weights, caches and activations
    encoders: Mapping[str, EncoderMemory] = field(default_factory=dict)  # by the runtime's name
    # precision in the engine's files -> precision of the loaded weights, where the two differ
    loaded_as: Mapping[str, str] = field(default_factory=dict)
    # (weights of each stage, number of parameters, whether the engine is calibrated) -> bytes of host memory that a
    # build takes, the engine of its smoke test not counted
    host_building: Callable[[Sequence[StageWeights], int, bool], int] = lambda stages, parameters, calibrated: 0


@dataclass(frozen=True)
class TritonPlacement:
    """Tells the model repository how Triton runs an engine."""

    vision_model: str = "vision_encoder"  # the folder of triton_repo that serves the vision encoder
    image_type: str = "TYPE_FP32"  # data type of tiles and image tokens
    decoder_kind: str = "KIND_CPU"
    graph_specs: str = ""  # CUDA graphs of the vision encoder
    max_tiles: int | None = None  # most tiles in a batch of the vision encoder; None: the repository chooses
    files: Mapping[str, Path] = field(default_factory=dict)  # linked into the vision model's version folder
    needs_backend: str | None = None  # a backend that tritonserver must have
    remedy: str = ""  # completes the error about a missing `needs_backend`


@dataclass(frozen=True)
class ServerNeeds:
    """Tells `nvlm-trt deploy` what an engine needs of the machines and the container that serve it."""

    container: str = "python:3.12-slim"  # nvlm-trt is installed in it
    extras: tuple[str, ...] = ("structured",)  # of nvlm-trt; most engines take constraints on answers
    packages: tuple[str, ...] = ()  # pip's requirements beside nvlm-trt
    index: str | None = None  # a package index for `packages`, beside the public one
    capability: int | None = None  # compute capability of the GPUs that alone run the engine: 90 for 9.0
    tp: int = 1  # tp * pp processes run the engine together, each on a GPU of its own; MPI numbers them
    pp: int = 1
    worker: str | None = None  # module that runs the ranks beside rank 0: `python3 -m MODULE ENGINE`


@dataclass(frozen=True)
class OpenOptions:
    """Options for opening an engine."""

    threads: int | None = None  # CPU threads per stage; None: all cores that this process may use
    device: str | None = None  # "cpu", "cuda", "cuda:1"; None: the device of the backend


OpenVision = Callable[[], "StepBackend"]


@dataclass(frozen=True)
class BackendSpec:
    """Describes one backend. Its functions import the runtime when they are called, not before.

    A backend runs single steps (`open`), from which the batcher makes a text generator, or it batches by itself
    (`open_generator`): then `open` loads no more than its vision encoder, if it has one."""

    name: str
    summary: str  # completes "runs the engine: ..." in --help
    device: str  # "cpu" or "cuda"
    precisions: PrecisionTable
    prefill_chunk: int  # most prompt tokens in one run, and between two decoding steps
    memory: MemoryModel
    probe: Callable[[], str]  # returns the runtime's name and version; raises EngineError that says how to install it
    build: Callable[[BuildJob], BuildSteps]  # raises EngineError if this machine cannot build
    open: Callable[[Engine, Collection[str], OpenOptions], StepBackend] | None = None  # loads some of STAGES
    # runs an engine a layer at a time; None: the engine is opened whole, or not at all
    open_layers: Callable[[Engine, LayerLoop, OpenOptions], EngineLayers] | None = None
    # the third argument opens the vision encoder, which the text generator closes; None: others encode the images
    open_generator: (
        Callable[[Engine, Tokenizer, OpenVision | None, OpenOptions, GeneratorOptions], TextGenerator] | None
    ) = None
    build_options: Mapping[str, Any] = field(default_factory=dict)  # option of `nvlm-trt build` -> its default
    # returns whether a build with these options ends with an engine that this machine runs; if not, the build needs no
    # runtime, and nothing tries or judges the engine
    runs_here: Callable[[Mapping[str, Any]], bool] = lambda options: True
    # completes an engine of such a build (engine, its new place, whether to overwrite, progress)
    complete: Callable[[Engine, Path, bool, Progress], Engine] | None = None
    # both raise EngineError for options, or limits, that the backend cannot build in the chosen precisions
    check_options: Callable[[Mapping[str, Any], Mapping[str, str]], None] = lambda options, chosen: None
    check_limits: Callable[[NvlmConfig, EngineLimits, Mapping[str, str]], None] = lambda config, limits, chosen: None
    placement: Callable[[Engine], TritonPlacement] = lambda engine: TritonPlacement()
    # runtimes beside its own that run stages of its engines, from the same files; their names stand in manifests
    stage_runtimes: Collection[str] = ()
    # precision of each component -> stage -> the one of `stage_runtimes` that runs it
    runtimes_of: Callable[[Mapping[str, str]], Mapping[str, str]] = lambda precisions: {}
    # returns the runtime that runs a stage on this machine, with its version, in words; None: `probe` says it
    runtime_here: Callable[[Engine, str], str] | None = None
    # raises EngineError for an engine that cannot be served
    server_needs: Callable[[Engine], ServerNeeds] = lambda engine: ServerNeeds()
    # returns the lines that `nvlm-trt build` prints about an engine that it has published
    describe: Callable[[Engine], Sequence[str]] = lambda engine: ()
