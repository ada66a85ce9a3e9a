"""Examines an engine against this machine: its files, the runtime of each stage, versions, memory, GPUs."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import psutil

from nvlm_trt.backends.base import stages_of
from nvlm_trt.backends.opening import backend_of, runtime_here
from nvlm_trt.backends.spec import BackendSpec
from nvlm_trt.diagnosis.finding import Finding, Severity, error, note, ok, tried
from nvlm_trt.diagnosis.hardware import query_gpus
from nvlm_trt.engine import Engine
from nvlm_trt.errors import NvlmError
from nvlm_trt.image.image_limits import ImageLimits
from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.planner.memory import plan_engine
from nvlm_trt.prompt.encoder import PromptEncoder
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.serving.triton.shared_memory import SharedMemory


def examine_engine(path: Path) -> list[Finding]:
    """Return findings about an engine; only one if the directory cannot be opened."""
    try:
        engine = Engine.open(path, full_check=True)
    except NvlmError as fault:
        detail, _, remedy = str(fault).partition("; ")
        return [error("engine", detail, remedy or "rebuild it with `nvlm-trt build`")]
    size = sum(record.size for record in engine.manifest.files.values())
    whole = f"{path} is whole: {len(engine.manifest.files)} files, {size / 1e6:.1f} MB"
    return [ok("engine", whole), *_stages(engine), *_versions(engine), *_needs(engine)]


def _stages(engine: Engine) -> Iterator[Finding]:
    """Name the runtime that runs each stage on this machine."""
    for stage in stages_of(engine.config):

        def check(stage: str = stage) -> str:
            return runtime_here(engine, stage)

        yield tried(f"stage {stage}", check, Severity.ERROR)


def _versions(engine: Engine) -> Iterator[Finding]:
    """Compare the packages that built the engine with those that are installed."""
    differing = []
    for package, built in engine.manifest.tool_versions.items():
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # a tool of the build: running the engine needs no such package
        if installed != built:
            differing.append(f"{package} {built}, here {installed}")
    if differing:
        yield note("built with", "; ".join(differing), "rebuild the engine if its answers differ from its verification")
    else:
        yield ok("built with", "the versions of this machine")
    if engine.manifest.verification is None:
        yield note("verified", "never", f"nvlm-trt verify {engine.path} --checkpoint DIR")


def _needs(engine: Engine) -> Iterator[Finding]:
    try:
        spec = backend_of(engine)
        yield _memory(engine, spec)
        yield from _gpus(engine, spec)

        def check() -> str:
            SharedMemory(engine, spec.placement(engine), ImageLimits()).check()
            return "/dev/shm holds the largest request"

        yield tried("serving", check, Severity.WARNING)
    except NvlmError as fault:
        detail, _, remedy = str(fault).partition("; ")
        yield error("needs", detail, remedy or "rebuild it with `nvlm-trt build`")


def _memory(engine: Engine, spec: BackendSpec) -> Finding:
    tag_length = PromptEncoder(engine.config, Tokenizer.from_directory(engine.path)).tag_length
    planned = plan_engine(EngineDesign.of(engine, tag_length))
    where = "GPU memory" if spec.memory.device == "gpu" else "memory"
    detail = f"about {planned.peak_running / 1e9:.2f} GB of {where} at most"
    available = psutil.virtual_memory().available
    if spec.memory.device == "host" and planned.peak_running > available:
        return error(
            "memory of the engine",
            f"{detail}, {available / 1e9:.2f} GB are available",
            "build it with lower --max-slots or --max-seq-len, or a smaller --precision",
        )
    return ok("memory of the engine", detail)


def _gpus(engine: Engine, spec: BackendSpec) -> Iterator[Finding]:
    """Compare the GPUs with the number and the compute capability that the engine needs."""
    if spec.device == "cpu":
        return
    needs, gpus = spec.server_needs(engine), query_gpus()
    wanted = needs.tp * needs.pp
    kind = f" of compute capability {needs.capability / 10:.1f}" if needs.capability else ""
    if isinstance(gpus, str):
        yield error("GPUs of the engine", f"{wanted}{kind} needed, {gpus}", "run it on a machine with NVIDIA's driver")
        return
    fit = [gpu for gpu in gpus if not needs.capability or gpu.get("compute_cap") == f"{needs.capability / 10:.1f}"]
    detail = f"{wanted}{kind} needed, {len(fit)} of {len(gpus)} here"
    if len(fit) < wanted:
        yield error("GPUs of the engine", detail, "run it on such GPUs, or rebuild it here with `nvlm-trt build`")
    else:
        yield ok("GPUs of the engine", detail)
