"""A checkpoint -> an engine for TensorRT: graphs in TensorRT's form, checked, built into plans, tried, published."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from nvlm_trt.backends.tensorrt.loaded_plan import GpuMemoryError
from nvlm_trt.backends.tensorrt.plan import PlanOptions, build_plan
from nvlm_trt.backends.tensorrt.profiles import Profile, profiles_of
from nvlm_trt.backends.tensorrt.target import Target, find_target
from nvlm_trt.builders.engine_build import QuantizationOptions, make_calibration
from nvlm_trt.builders.engine_writer import EngineWriter, save_model
from nvlm_trt.builders.graphs.cross_kv import cross_kv_graph
from nvlm_trt.builders.graphs.decoder import decoder_graph
from nvlm_trt.builders.graphs.self_attention import TensorRtAttention
from nvlm_trt.builders.graphs.vision_attention import tensorrt_vision_attention
from nvlm_trt.builders.graphs.vision_encoder import vision_encoder_graph
from nvlm_trt.builders.quantization.calibration import Calibration
from nvlm_trt.builders.quantization.formats import Recipe, quantised
from nvlm_trt.builders.quantization.gate import NOT_MEASURED, AccuracyGate
from nvlm_trt.builders.quantization.smoothquant import MigratedWeights
from nvlm_trt.builders.smoke_test import SmokeTest
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.engine import (
    CALIBRATION,
    Engine,
    EngineLimits,
    Manifest,
    TensorRtRecord,
    publish,
    save_manifest,
    temporary_sibling,
    tool_versions,
    write_manifest,
)
from nvlm_trt.errors import EngineError
from nvlm_trt.model.config import LlmConfig, NvlmConfig
from nvlm_trt.model.precision import (
    components_of,
    floating_type,
    needs_calibration,
    parse_precision,
    quantised_components,
)
from nvlm_trt.planner.memory import EnginePlan, plan_engine
from nvlm_trt.plugins.gated_cross_attention.blocks import HEAD_DIMS
from nvlm_trt.plugins.gated_cross_attention.onnx_function import NAME, PLUGIN_ATTRIBUTES
from nvlm_trt.plugins.gated_cross_attention.tensorrt_plugin import register_plugin
from nvlm_trt.progress import Progress, no_progress

DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_ALIGNMENT = 256  # bytes
PLUGIN = f"{PLUGIN_ATTRIBUTES['plugin_namespace']}::{NAME}"


def build_tensorrt_engine(
    checkpoint_dir: Path | str,
    output: Path | str,
    overrides: Mapping[str, int] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    precision: str = "bf16",
    quantization: QuantizationOptions | None = None,
    options: PlanOptions | None = None,
) -> Engine:
    """Publish the engine of a checkpoint for this machine's TensorRT and GPU as the directory `output`.

    Arguments as for `onnx_engine.build_engine`. int8 and fp8 are calibrated as there, by ONNX Runtime. The gate
    compares with an engine in the floating-point type of what is not quantised, which is built and run here as well.
    Raises EngineError without TensorRT or a GPU, for a graph that TensorRT refuses and for want of memory, saying what
    was expected to be needed; otherwise what `build_engine` raises."""
    precisions = parse_precision(precision, "tensorrt")
    target = find_target()
    progress = progress or no_progress
    quantization = quantization or QuantizationOptions(gate=None)
    with publish(output, overwrite) as staging:
        writer = EngineWriter(checkpoint_dir, overrides or {})
        precisions = {name: precisions[name] for name in components_of(writer.config)}
        trial = SmokeTest(writer.prompts, writer.limits, writer.config)
        _check_rows(writer.config.llm, writer.limits, floating_type(precisions))
        builder = _Builder(writer, target, options or PlanOptions(), quantization, staging, progress)
        is_quantised = bool(quantised_components(precisions))
        gate = None
        if quantization.gate and is_quantised:
            gate = AccuracyGate(quantization.gate, builder.write, staging, progress, floating_type(precisions))
        manifest = builder.write(precisions, staging)
        progress("smoke test", 0, 1)
        try:
            trial.run(Engine.open(staging))
        except GpuMemoryError as error:
            expected = builder.plan(precisions).peak_building / 1e9
            raise EngineError(f"{error}. The whole engine was expected to take {expected:.2f} GB on the GPU") from error
        progress("smoke test", 1, 1)
        if is_quantised:
            manifest.accuracy_gate = gate.check(staging, precisions) if gate else NOT_MEASURED
            save_manifest(staging, manifest)
    return Engine.open(output)


def write_graphs(
    writer: EngineWriter, recipe: Recipe, dtype_name: str, directory: Path, progress: Progress
) -> dict[str, Path]:
    """Component -> its ONNX file in TensorRT's form, weights beside it; every tensor of the checkpoint in one.

    `dtype_name` is one of DTYPES: the type of everything that is not quantised."""
    config, dtype, linear = writer.config, DTYPES[dtype_name], recipe.weight_format
    with Checkpoint.open(writer.checkpoint_dir) as checkpoint:
        weights = MigratedWeights(checkpoint, recipe.factors)
        graphs = {"vision_encoder": vision_encoder_graph(config, weights, linear, tensorrt_vision_attention, dtype)}
        if config.cross_layers:
            graphs["cross_kv"] = cross_kv_graph(config, weights, writer.tag_embeddings(checkpoint), linear, dtype)
        graphs["decoder"] = decoder_graph(config, weights, writer.limits, linear, TensorRtAttention, dtype=dtype)
        checkpoint.finish()
        for component, model in graphs.items():
            save_model(model, directory / f"{component}.onnx", progress)
    return {component: directory / f"{component}.onnx" for component in graphs}


@dataclass
class _Builder:
    """Engines of one checkpoint in any precision, all from one calibration, which is made when it is first needed."""

    writer: EngineWriter
    target: Target
    options: PlanOptions
    quantization: QuantizationOptions
    beside: Path  # the calibration's engine is its temporary sibling
    progress: Progress

    def write(self, chosen: Mapping[str, str], directory: Path) -> Manifest:
        """Fill an empty directory with plans, configuration and manifest."""
        writer = self.writer
        precisions = {name: chosen[name] for name in components_of(writer.config)}
        if writer.config.cross_layers:
            _register_plugin(writer.config, self.target)
        recipe = self._recipe(precisions, directory)
        dtype = floating_type(precisions)
        profiles = profiles_of(writer.config, writer.limits)
        writer.write_model_files(directory)
        self._write_plans(recipe, dtype, profiles, directory)
        manifest = Manifest(
            model_name=writer.config.name,
            architecture=writer.config.architecture,
            backend="tensorrt",
            precision=precisions,
            limits=writer.limits,
            checkpoint_digest=writer.digest,
            tool_versions=tool_versions("onnx", "onnx-ir", "onnxscript", "polygraphy"),
            calibration=recipe.calibration,
            tensorrt=self._record(dtype, profiles),
        )
        write_manifest(directory, manifest)
        return manifest

    def plan(self, precisions: Mapping[str, str]) -> EnginePlan:
        """What an engine is expected to take."""
        writer = self.writer
        return plan_engine(writer.config, writer.limits, precisions, "tensorrt", writer.prompts.tag_length)

    def _recipe(self, precisions: Mapping[str, str], directory: Path) -> Recipe:
        calibration = self._calibration if needs_calibration(precisions) else None
        if calibration:
            calibration.save(directory / CALIBRATION)
        with Checkpoint.open(self.writer.checkpoint_dir) as checkpoint:
            alpha = self.quantization.smoothquant_alpha
            return quantised(checkpoint, precisions, calibration, alpha, fold_fp8=False)

    @functools.cached_property
    def _calibration(self) -> Calibration:
        return make_calibration(self.writer, self.quantization, self.beside, self.progress)

    def _write_plans(
        self, recipe: Recipe, dtype: str, profiles: Mapping[str, Sequence[Profile]], directory: Path
    ) -> None:
        expected = self.plan(recipe.precisions).stages
        with temporary_sibling(directory) as work:
            # a stripped plan is refitted from its graph, which then stays beside it
            beside = directory if self.options.strip_weights else work
            graphs = write_graphs(self.writer, recipe, dtype, beside, self.progress)
            cache = timing_cache_path(self.target)
            for done, (component, graph) in enumerate(graphs.items()):
                self.progress(f"building {component}", done, len(graphs))
                plan = directory / f"{component}.plan"
                build_plan(graph, plan, profiles[component], self.options, cache, expected[component])
            self.progress("building", len(graphs), len(graphs))

    def _record(self, dtype: str, profiles: dict[str, list[Profile]]) -> TensorRtRecord:
        layers = range(self.writer.config.llm.num_layers)
        return TensorRtRecord(
            version=self.target.tensorrt,
            capability=self.target.capability,
            gpu=self.target.gpu,
            container=self.target.container,
            dtype=dtype,
            plugin=PLUGIN,
            aliased={f"present_{kind}.{i}": f"past_{kind}.{i}" for i in layers for kind in ("key", "value")},
            profiles=profiles,
            stripped=self.options.strip_weights,
            weight_streaming=self.options.weight_streaming,
        )


def _check_rows(llm: LlmConfig, limits: EngineLimits, dtype: str) -> None:
    """A slot's row of a cache is bound by its address, which TensorRT wants to be a multiple of 256
    (IExecutionContext::setTensorAddress). The cross-attention cache's length is a multiple of 16, which suffices."""
    token = llm.num_kv_heads * llm.head_dim * DTYPES[dtype].itemsize
    step = _ALIGNMENT // math.gcd(_ALIGNMENT, int(token))
    if limits.max_seq_len % step:
        raise EngineError(
            f"max_seq_len {limits.max_seq_len} leaves a slot's cache in {dtype} at an address that TensorRT does not "
            f"take; choose a --max-seq-len that is a multiple of {step}"
        )


def _register_plugin(config: NvlmConfig, target: Target) -> None:
    if config.llm.head_dim not in HEAD_DIMS:
        raise EngineError(
            f"the plugin for TensorRT has heads of {', '.join(map(str, HEAD_DIMS))}, this model's have "
            f"{config.llm.head_dim}; build it with --backend onnxruntime"
        )
    try:
        register_plugin(target.capability)
    except ImportError as error:
        raise EngineError(f"the plugin's kernel is compiled by triton ({error}); `pip install triton`") from None


def timing_cache_path(target: Target) -> Path:
    """Timings hold for one GPU and one TensorRT, those of the plugin for one version of it."""
    parts = f"{target.gpu}-sm{target.capability}-tensorrt{target.tensorrt}-{PLUGIN}"
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "nvlm-trt" / f"{re.sub('[^A-Za-z0-9._]+', '-', parts)}.timing"
