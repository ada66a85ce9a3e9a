"""Builds TensorRT engines, compares them with the reference stage by stage, inspects them, and times them.

Takes three tiny models with random weights, and a stack of layers of the 72B model's shapes. Needs TensorRT with its
builder and the package with all its dependencies; without them a single trial says what is missing.
"""

from __future__ import annotations

import importlib
import inspect
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.gpu_check.record import MEASURED, PASSED, WRONG, NotAvailableError, Result, Trial, Value
from lab.gpu_check.tensorrt_plan import Layers, component_plans, latency, open_plan

if TYPE_CHECKING:
    from nvlm_trt.model.config import NvlmConfig

SECTION = "tensorrt"
BUILDER = "nvlm_trt.builders.engine_build"
BACKEND = "tensorrt"
PLUGIN, KERNEL = "GatedCrossAttention", "gated_cross_attention_kernel"

# The least cosine between any stage's output and the reference's.
COSINES = {"fp32": 0.9999, "bf16": 0.999}
DISK = 40 << 30  # bytes for the stack: its checkpoint, ONNX files and two engines


def require_tensorrt() -> None:
    """Raises NotAvailableError that names what is missing: TensorRT, its builder, or a part of the package."""
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError as error:
        raise NotAvailableError(f"TensorRT is not installed ({error})") from None
    try:
        builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    except (TypeError, RuntimeError):  # the bindings raise one of them for a null pointer
        builder = None
    if builder is None:
        raise NotAvailableError(f"TensorRT {trt.__version__} is here without its builder")
    _builder()


def _builder() -> Any:
    """Imports the product's builder. Raises NotAvailableError if it or one of its imports is missing."""
    try:
        module = importlib.import_module(BUILDER)
    except ImportError as error:
        raise NotAvailableError(f"{BUILDER}: {error}") from None
    if not hasattr(module, "build_engine"):
        raise NotAvailableError(f"{BUILDER} has no build_engine")
    return module


def build(checkpoint: Path, output: Path, precision: str, limits: Mapping[str, int], calibration: Path | None) -> None:
    """Builds an engine without a gate. No other lines of the GPU check know the builder's interface.

    Raises NotAvailableError if the builder does not take these arguments."""
    builder = _builder()
    quantization = builder.QuantizationOptions(calibration=calibration, gate=None)
    arguments = {"overrides": limits, "precision": precision, "quantization": quantization, "backend": BACKEND}
    try:
        inspect.signature(builder.build_engine).bind(checkpoint, output, **arguments)
    except TypeError as error:
        raise NotAvailableError(f"{BUILDER}.build_engine: {error}") from None
    builder.build_engine(checkpoint, output, **arguments)


def tiny_config(architecture: str) -> NvlmConfig:
    """Returns the tiny preset with heads of 64, the smallest that the plugin has."""
    from nvlm_trt.model.presets import PRESETS

    config = PRESETS[f"nvlm-{architecture}-tiny"]
    llm = replace(config.llm, num_heads=3, num_kv_heads=1, head_dim=64)
    return replace(config, name=f"{config.name}-heads-of-64", llm=llm)


def stack_config() -> NvlmConfig:
    """Returns NVLM-X-72B's shapes: two layers of the LLM behind one gated block, and two of the vision encoder."""
    from nvlm_trt.model.config import CrossAttentionConfig
    from nvlm_trt.model.presets import PRESETS

    config = PRESETS["nvlm-x-72b"]
    return replace(
        config,
        name="nvlm-x-72b-2-layers",
        vision=replace(config.vision, num_layers=2),
        llm=replace(config.llm, num_layers=2, vocab_size=512),
        cross_attention=CrossAttentionConfig(interval=2),
    )


class Workbench:
    """Makes checkpoints and engines below one folder, each once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def checkpoint(self, config: NvlmConfig) -> Path:
        from nvlm_trt.checkpoint.random_checkpoint import write_random_checkpoint

        directory = self.folder / config.name
        if not directory.exists():
            write_random_checkpoint(directory, config, seed=0)
        return directory

    def engine(self, config: NvlmConfig, precision: str) -> Path:
        """Raises NotAvailableError if its build failed before."""
        directory = self._engine(config, precision)
        if not directory.exists():
            raise NotAvailableError("this engine was not built")
        return directory

    def build(self, config: NvlmConfig, precision: str, limits: Mapping[str, int]) -> Result:
        output = self._engine(config, precision)
        checkpoint = self.checkpoint(config)
        calibration = made_up_calibration(checkpoint, config) if precision == "fp8" else None
        build(checkpoint, output, precision, limits, calibration)
        size = sum(path.stat().st_size for path in output.rglob("*")) / 1e6
        return Result(PASSED, {"engine MB": size})

    def _engine(self, config: NvlmConfig, precision: str) -> Path:
        return self.folder / f"{config.name}-{precision}-engine"


def made_up_calibration(checkpoint: Path, config: NvlmConfig) -> Path:
    """Writes made-up scales for an engine whose speed alone counts: a calibration would run the stack on the CPU."""
    from nvlm_trt.builders.quantization.calibration import Calibration, LinearInput
    from nvlm_trt.checkpoint.reader import Checkpoint
    from nvlm_trt.model.layout import checkpoint_layout

    with Checkpoint.open(checkpoint) as opened:
        digest = opened.digest
    linears = {
        name.removesuffix(".weight"): LinearInput(abs_max=16.0, clip=8.0, channels=[8.0] * shape[1])
        for name, shape in checkpoint_layout(config).items()
        if name.endswith(".weight") and len(shape) == 2
    }
    path = checkpoint.parent / f"{config.name}-calibration.json"
    Calibration(checkpoint_digest=digest, samples={"count": 0}, linears=linears).save(path)
    return path


def parity(bench: Workbench, config: NvlmConfig, precision: str) -> Result:
    """Judges the stages that `nvlm-trt verify` compares by their cosine."""
    from nvlm_trt.evaluation.parity import verify_engine

    directory = bench.engine(config, precision)
    report = verify_engine(directory, bench.checkpoint(config), tokens=16, tolerance=math.inf)
    values: dict[str, Value] = {}
    least, good = COSINES[precision], bool(report.stages)
    for stage in report.stages:
        if stage.cosine:
            cosine = float(stage.cosine) if stage.cosine != "-" else 0.0  # "-": not finite, or another shape
            values[f"{stage.name}: cosine"] = f"{cosine:.6f}"
            good &= cosine >= least
        else:
            values[stage.name] = stage.shape
    return Result(PASSED if good else WRONG, values, f"least cosine {least}")


def plugin_taken(bench: Workbench, config: NvlmConfig, precision: str) -> Result:
    """Checks that as many layers of the decoder are the plugin as there are gated blocks."""
    plan = component_plans(bench.engine(config, precision))["decoder"]
    layers = Layers.of(open_plan(plan))
    expected, found = len(config.cross_layers), layers.named(PLUGIN, KERNEL)
    values: dict[str, Value] = {"gated blocks": expected, "plugin layers": found, "layers": layers.count}
    return Result(PASSED if found == expected else WRONG, values, "" if found else f"layers: {layers.kinds()}")


def fp8_fused(bench: Workbench, config: NvlmConfig, precision: str) -> Result:
    """Counts layers that read FP8, and dequantisations that no layer took in."""
    layers = Layers.of(open_plan(component_plans(bench.engine(config, precision))["decoder"]))
    values: dict[str, Value] = {
        "layers that read FP8": layers.reading("FP8"),
        "dequantisations left": layers.named("dequantize"),
        "layers": layers.count,
    }
    good = layers.reading("FP8") and not layers.named("dequantize")
    return Result(PASSED if good else WRONG, values)


def time_of(bench: Workbench, config: NvlmConfig, precision: str, component: str, profile: int) -> Result:
    """Times one profile at its optimal shapes."""
    plan = component_plans(bench.engine(config, precision)).get(component)
    if plan is None:
        raise NotAvailableError(f"the engine has no {component}.plan")
    return Result(MEASURED, *latency(open_plan(plan), profile))


def trials() -> Iterator[Trial]:
    """Yields the trials, which need a GPU. Checkpoints and engines lie in a temporary folder."""
    try:
        require_tensorrt()
    except NotAvailableError:
        yield "engines", _tell_what_is_missing
        return
    with tempfile.TemporaryDirectory() as made:
        bench = Workbench(Path(made))
        for architecture in "dxh":
            config = tiny_config(architecture)
            for precision in COSINES:
                what = f"{config.name}, {precision}"
                yield f"build of {what}", partial(bench.build, config, precision, {})
                yield f"parity of {what}", partial(parity, bench, config, precision)
                if config.cross_layers:
                    yield f"plugin in {what}", partial(plugin_taken, bench, config, precision)
        yield from _stack(bench)


def _tell_what_is_missing() -> Result:
    require_tensorrt()
    return Result(PASSED)


def _stack(bench: Workbench) -> Iterator[Trial]:
    config = stack_config()
    free = shutil.disk_usage(bench.folder).free
    if free < DISK:
        yield f"{config.name}", partial(_too_little_room, free)
        return
    limits = {"max_slots": 8, "max_seq_len": 2048, "max_image_tokens": 1792}
    for precision in ("bf16", "fp8"):
        what = f"{config.name}, {precision}"
        yield f"build of {what}", partial(bench.build, config, precision, limits)
        yield f"plugin in {what}", partial(plugin_taken, bench, config, precision)
        if precision == "fp8":
            yield f"fused in {what}", partial(fp8_fused, bench, config, precision)
        for component, profiles in (("vision_encoder", 1), ("cross_kv", 1), ("decoder", 2)):
            for profile in range(profiles):
                yield (
                    f"time of {what}: {component}, profile {profile}",
                    partial(time_of, bench, config, precision, component, profile),
                )
    # last, as the reference runs these large shapes on the CPU
    yield f"parity of {config.name}, bf16", partial(parity, bench, config, "bf16")


def _too_little_room(free: int) -> Result:
    raise NotAvailableError(f"{free / 1e9:.0f} GB of disk are free, {DISK / 1e9:.0f} are needed; set TMPDIR")
