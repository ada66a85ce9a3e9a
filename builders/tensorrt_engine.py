"""A checkpoint -> an engine for TensorRT: graphs in TensorRT's form, checked, built into plans, tried, published."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from nvlm_trt.builders.engine_writer import EngineWriter, save_model
from nvlm_trt.builders.graphs.cross_kv import cross_kv_graph
from nvlm_trt.builders.graphs.decoder import decoder_graph
from nvlm_trt.builders.graphs.vision_encoder import vision_encoder_graph
from nvlm_trt.builders.onnx_engine import QuantizationOptions, make_calibration
from nvlm_trt.builders.quantization.formats import Recipe, quantised
from nvlm_trt.builders.quantization.gate import NOT_MEASURED
from nvlm_trt.builders.quantization.precisions import (
    components_of,
    floating_type,
    needs_calibration,
    parse_precision,
    quantised_components,
)
from nvlm_trt.builders.quantization.smoothquant import MigratedWeights
from nvlm_trt.builders.smoke_test import SmokeTest
from nvlm_trt.builders.tensorrt_plan import PlanOptions, build_plan
from nvlm_trt.builders.tensorrt_profiles import profiles_of
from nvlm_trt.checkpoint import Checkpoint
from nvlm_trt.config import NvlmConfig
from nvlm_trt.engine import (
    CALIBRATION,
    Engine,
    Manifest,
    TensorRtRecord,
    publish,
    temporary_sibling,
    tool_versions,
    write_manifest,
)
from nvlm_trt.errors import EngineError
from nvlm_trt.plugins.gated_cross_attention.blocks import HEAD_DIMS
from nvlm_trt.plugins.gated_cross_attention.onnx_function import NAME, PLUGIN_ATTRIBUTES
from nvlm_trt.plugins.gated_cross_attention.tensorrt_plugin import register_plugin
from nvlm_trt.progress import Progress, no_progress
from nvlm_trt.tensorrt_target import Target, find_target

DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
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

    Arguments as for `onnx_engine.build_engine`. int8 and fp8 are calibrated as there, by ONNX Runtime, and published
    unmeasured. Raises EngineError without TensorRT or a GPU, for a graph that TensorRT refuses and for want of memory;
    otherwise what `build_engine` raises."""
    precisions = parse_precision(precision, "tensorrt")
    target = find_target()
    progress = progress or no_progress
    builder = _Builder(target, options or PlanOptions(), quantization or QuantizationOptions(), progress)
    with publish(output, overwrite) as staging:
        writer = EngineWriter(checkpoint_dir, overrides or {})
        trial = SmokeTest(writer.prompts, writer.limits, writer.config)
        builder.write(writer, {name: precisions[name] for name in components_of(writer.config)}, staging)
        progress("smoke test", 0, 1)
        trial.run(Engine.open(staging))
        progress("smoke test", 1, 1)
    return Engine.open(output)


def write_graphs(
    writer: EngineWriter, recipe: Recipe, dtype_name: str, directory: Path, progress: Progress
) -> dict[str, Path]:
    """Component -> its ONNX file in TensorRT's form, weights beside it; every tensor of the checkpoint in one.

    `dtype_name` is one of DTYPES: the type of everything that is not quantised."""
    config, dtype, linear = writer.config, DTYPES[dtype_name], recipe.weight_format
    with Checkpoint.open(writer.checkpoint_dir) as checkpoint:
        weights = MigratedWeights(checkpoint, recipe.factors)
        graphs = {"vision_encoder": vision_encoder_graph(config, weights, linear, "tensorrt", dtype)}
        if config.cross_layers:
            graphs["cross_kv"] = cross_kv_graph(config, weights, writer.tag_embeddings(checkpoint), linear, dtype)
        graphs["decoder"] = decoder_graph(config, weights, writer.limits, linear, "tensorrt", dtype=dtype)
        checkpoint.finish()
        for component, model in graphs.items():
            save_model(model, directory / f"{component}.onnx", progress)
    return {component: directory / f"{component}.onnx" for component in graphs}


@dataclass(frozen=True)
class _Builder:
    target: Target
    options: PlanOptions
    quantization: QuantizationOptions
    progress: Progress

    def write(self, writer: EngineWriter, precisions: Mapping[str, str], directory: Path) -> None:
        """Fill an empty directory with plans, configuration and manifest."""
        if writer.config.cross_layers:
            _register_plugin(writer.config, self.target)
        recipe = self._recipe(writer, precisions, directory)
        dtype = floating_type(precisions)
        profiles = profiles_of(writer.config, writer.limits)
        writer.write_model_files(directory)
        with temporary_sibling(directory) as work:
            # a stripped plan is refitted from its graph, which then stays beside it
            graphs = write_graphs(
                writer, recipe, dtype, directory if self.options.strip_weights else work, self.progress
            )
            for done, (component, graph) in enumerate(graphs.items()):
                self.progress(f"building {component}", done, len(graphs))
                plan = directory / f"{component}.plan"
                build_plan(graph, plan, profiles[component], self.options, timing_cache_path(self.target))
            self.progress("building", len(graphs), len(graphs))
        record = TensorRtRecord(
            version=self.target.tensorrt,
            capability=self.target.capability,
            gpu=self.target.gpu,
            container=self.target.container,
            dtype=dtype,
            plugin=PLUGIN,
            aliased={
                f"present_{kind}.{i}": f"past_{kind}.{i}"
                for i in range(writer.config.llm.num_layers)
                for kind in ("key", "value")
            },
            profiles=profiles,
            stripped=self.options.strip_weights,
            weight_streaming=self.options.weight_streaming,
        )
        manifest = Manifest(
            model_name=writer.config.name,
            architecture=writer.config.architecture,
            backend="tensorrt",
            precision=dict(precisions),
            limits=writer.limits,
            checkpoint_digest=writer.digest,
            tool_versions=tool_versions("onnx", "onnx-ir", "onnxscript", "polygraphy"),
            calibration=recipe.calibration,
            tensorrt=record,
            accuracy_gate=NOT_MEASURED if quantised_components(precisions) else None,
        )
        write_manifest(directory, manifest)

    def _recipe(self, writer: EngineWriter, precisions: Mapping[str, str], directory: Path) -> Recipe:
        calibration = None
        if needs_calibration(precisions):
            calibration = make_calibration(writer, self.quantization, directory, self.progress)
            calibration.save(directory / CALIBRATION)
        with Checkpoint.open(writer.checkpoint_dir) as checkpoint:
            alpha = self.quantization.smoothquant_alpha
            return quantised(checkpoint, precisions, calibration, alpha, fold_fp8=False)


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
