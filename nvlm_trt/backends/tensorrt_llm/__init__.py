"""Describes the backend TensorRT-LLM: engines for one GPU or many, whose executor batches by itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvlm_trt.backends.spec import BackendSpec, MemoryModel, OpenOptions, OpenVision, ServerNeeds, TritonPlacement
from nvlm_trt.model.precision import PrecisionTable
from nvlm_trt.progress import Progress

if TYPE_CHECKING:
    from nvlm_trt.backends.base import StepBackend
    from nvlm_trt.builders.build_steps import BuildJob, BuildSteps
    from nvlm_trt.engine import Engine
    from nvlm_trt.prompt.tokenizer import Tokenizer
    from nvlm_trt.runtime.text_generator import GeneratorOptions, TextGenerator

NAME = "tensorrt-llm"
DEVICE = "cuda"
CHUNK = 2048  # tokens in one step of all requests: chunks of prompts, and a token of each decoding request

# lm_head stays in floating point, as TensorRT-LLM leaves it. `cross_attention` names the precision of the gated blocks'
# FFN: one activation scale would have to serve text and images in their attention, which stays in floating point.
# fmt: off
PRECISIONS = PrecisionTable(NAME, default="bf16", names={
    # name               vision_encoder projector decoder             lm_head cross_attention
    "bf16":             ("bf16",        "bf16",   "bf16",             "bf16", "bf16"),
    "fp16":             ("fp16",        "fp16",   "fp16",             "fp16", "fp16"),
    "fp8":              ("bf16",        "bf16",   "fp8",              "bf16", "fp8"),
    "int8":             ("bf16",        "bf16",   "int8",             "bf16", "int8"),
    "int8-weight-only": ("bf16",        "bf16",   "int8-weight-only", "bf16", "int8-weight-only"),
    "int4-weight-only": ("bf16",        "bf16",   "int4-weight-only", "bf16", "int4-weight-only"),
})
# fmt: on


def _probe() -> str:
    from nvlm_trt.backends.tensorrt_llm.runtime import installed_version

    return f"TensorRT-LLM {installed_version()}"


def _runs_here(options: Mapping[str, Any]) -> bool:
    return not options["checkpoint_only"]


def _check_options(options: Mapping[str, Any], precisions: Mapping[str, str]) -> None:
    from nvlm_trt.backends.tensorrt_llm.options import LlmOptions

    LlmOptions.read(options)


def _complete(engine: Engine, output: Path, overwrite: bool, progress: Progress) -> Engine:
    from nvlm_trt.backends.tensorrt_llm.completion import complete

    return complete(engine, output, overwrite, progress)


def _build(job: BuildJob) -> BuildSteps:
    from nvlm_trt.backends.tensorrt_llm.build import TensorRtLlmSteps

    return TensorRtLlmSteps(job)


def _open(engine: Engine, stages: Collection[str], options: OpenOptions) -> StepBackend:
    from nvlm_trt.backends.tensorrt_llm.vision import TorchVisionEncoder

    return TorchVisionEncoder(engine, stages, options.device or DEVICE)


def _open_generator(
    engine: Engine,
    tokenizer: Tokenizer,
    open_vision: OpenVision | None,
    options: OpenOptions,
    generator_options: GeneratorOptions,
) -> TextGenerator:
    from nvlm_trt.backends.tensorrt_llm.executor import ExecutorGenerator

    return ExecutorGenerator(engine, tokenizer, open_vision, options.device or DEVICE, generator_options.max_queue)


def _placement(engine: Engine) -> TritonPlacement:
    """Let our python models run both parts: image tokens go through host memory, and nothing is lost in TYPE_FP32."""
    from nvlm_trt.backends.tensorrt_llm.engine_files import check_engine_files

    check_engine_files(engine)
    return TritonPlacement()


def _server_needs(engine: Engine) -> ServerNeeds:
    from nvlm_trt.backends.tensorrt_llm.engine_files import check_engine_files

    record = check_engine_files(engine)
    return ServerNeeds(record.container, extras=(), tp=record.tp, pp=record.pp, worker=f"{__name__}.worker")


def _describe(engine: Engine) -> Sequence[str]:
    from nvlm_trt.backends.tensorrt_llm.record import record_of

    record = record_of(engine)
    ranks = "one GPU" if record.ranks == 1 else f"{record.ranks} GPUs (tp {record.tp} x pp {record.pp})"
    lines = [f"TensorRT-LLM {record.version} on {ranks}, in {record.container}"]
    if record.form == "checkpoint":
        lines.append(f"not built yet: there, run `nvlm-trt build --continue {engine.path} --output ENGINE`")
    elif record.ranks > 1:
        lines.append("started by mpirun or srun; `nvlm-trt deploy` writes how")
    return lines


SPEC = BackendSpec(
    name=NAME,
    summary="tensorrt-llm (one GPU or many, docs/tensorrt_llm.md)",
    device=DEVICE,
    precisions=PRECISIONS,
    prefill_chunk=CHUNK,
    memory=MemoryModel(device="gpu", encode_tiles=8, graphs_first=True),
    probe=_probe,
    build=_build,
    open=_open,
    open_generator=_open_generator,
    build_options={"tp": 1, "pp": 1, "checkpoint_only": False},
    runs_here=_runs_here,
    complete=_complete,
    check_options=_check_options,
    placement=_placement,
    server_needs=_server_needs,
    describe=_describe,
)
