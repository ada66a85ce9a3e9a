"""Implements the steps of a build for TensorRT: graphs in TensorRT's form, checked and built into plans."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from nvlm_trt.backends.onnxruntime.build import calibrate
from nvlm_trt.backends.tensorrt import PREFILL_CHUNK, SPEC
from nvlm_trt.backends.tensorrt.options import PlanOptions
from nvlm_trt.backends.tensorrt.plan import build_plan
from nvlm_trt.backends.tensorrt.profiles import profiles_of
from nvlm_trt.backends.tensorrt.record import TensorRtRecord
from nvlm_trt.backends.tensorrt.target import Target, find_target
from nvlm_trt.builders.engine_build import BuildJob
from nvlm_trt.builders.graphs.cross_kv import cross_kv_graph
from nvlm_trt.builders.graphs.decoder import decoder_graph
from nvlm_trt.builders.graphs.self_attention import TensorRtAttention
from nvlm_trt.builders.graphs.vision_attention import tensorrt_vision_attention
from nvlm_trt.builders.graphs.vision_encoder import vision_encoder_graph
from nvlm_trt.builders.model_file import save_model
from nvlm_trt.builders.quantization.calibration import Calibration
from nvlm_trt.builders.quantization.formats import Recipe, WeightForm
from nvlm_trt.builders.quantization.smoothquant import MigratedWeights
from nvlm_trt.builders.source import EngineSource
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.errors import EngineError
from nvlm_trt.evaluation.samples import Sample
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.precision import floating_type
from nvlm_trt.planner.memory import plan_engine
from nvlm_trt.plugins.gated_cross_attention.blocks import HEAD_DIMS
from nvlm_trt.plugins.gated_cross_attention.onnx_function import NAME, PLUGIN_ATTRIBUTES
from nvlm_trt.plugins.gated_cross_attention.tensorrt_plugin import register_plugin
from nvlm_trt.progress import Progress
from nvlm_trt.staging import temporary_sibling

DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
PLUGIN = f"{PLUGIN_ATTRIBUTES['plugin_namespace']}::{NAME}"


class TensorRtSteps:
    """Implements `BuildSteps` for the TensorRT and the GPU of this machine.

    Raises EngineError without TensorRT or a GPU, for a graph that TensorRT refuses, and if memory does not suffice; the
    message then names the expected memory."""

    tools: Sequence[str] = ("onnx", "onnx-ir", "onnxscript", "polygraphy")
    weight_form = WeightForm.TENSORRT

    def __init__(self, job: BuildJob) -> None:
        self._job = job
        self._options = PlanOptions(**job.options)
        self._target = find_target()
        self._profiles = profiles_of(job.source.config, job.source.limits, PREFILL_CHUNK)

    def unquantised(self, precisions: Mapping[str, str]) -> str:
        return floating_type(precisions)

    def calibrate(self, samples: Sequence[Sample]) -> Calibration:
        return calibrate(self._job, samples)

    def write_stages(self, directory: Path, recipe: Recipe) -> dict[str, Any] | None:
        source, dtype = self._job.source, floating_type(recipe.precisions)
        if source.config.cross_layers:
            _register_plugin(source.config, self._target)
        self._write_plans(recipe, dtype, directory)
        return self._record(dtype).model_dump()

    def _write_plans(self, recipe: Recipe, dtype: str, directory: Path) -> None:
        source, progress = self._job.source, self._job.progress
        expected = plan_engine(source.config, source.limits, recipe.precisions, SPEC, source.prompts.tag_length).stages
        with temporary_sibling(directory) as work:
            # loading a stripped plan refits it from its graph, so the graph stays beside the plan
            beside = directory if self._options.strip_weights else work
            graphs = write_graphs(source, recipe, dtype, beside, progress)
            cache = timing_cache_path(self._target)
            for done, (stage, graph) in enumerate(graphs.items()):
                progress(f"building {stage}", done, len(graphs))
                plan = directory / f"{stage}.plan"
                build_plan(graph, plan, self._profiles[stage], self._options, cache, expected[stage])
            progress("building", len(graphs), len(graphs))

    def _record(self, dtype: str) -> TensorRtRecord:
        layers = range(self._job.source.config.llm.num_layers)
        return TensorRtRecord(
            version=self._target.tensorrt,
            capability=self._target.capability,
            gpu=self._target.gpu,
            container=self._target.container,
            dtype=dtype,
            plugin=PLUGIN,
            aliased={f"present_{kind}.{i}": f"past_{kind}.{i}" for i in layers for kind in ("key", "value")},
            profiles=self._profiles,
            stripped=self._options.strip_weights,
            weight_streaming=self._options.weight_streaming,
        )


def write_graphs(
    source: EngineSource, recipe: Recipe, dtype_name: str, directory: Path, progress: Progress
) -> dict[str, Path]:
    """Write one ONNX file per stage in TensorRT's form, weights beside it. Return stage -> file.

    Together the files hold every tensor of the checkpoint. `dtype_name`, a key of DTYPES, is the type of everything
    that is not quantised."""
    config, dtype, linear = source.config, DTYPES[dtype_name], recipe.weight_format
    with Checkpoint.open(source.checkpoint_dir) as checkpoint:
        weights = MigratedWeights(checkpoint, recipe.factors)
        graphs = {"vision_encoder": vision_encoder_graph(config, weights, linear, tensorrt_vision_attention, dtype)}
        if config.cross_layers:
            graphs["cross_kv"] = cross_kv_graph(config, weights, source.tag_embeddings(checkpoint), linear, dtype)
        graphs["decoder"] = decoder_graph(config, weights, source.limits, linear, TensorRtAttention, dtype=dtype)
        checkpoint.finish()
        for stage, model in graphs.items():
            save_model(model, directory / f"{stage}.onnx", progress)
    return {stage: directory / f"{stage}.onnx" for stage in graphs}


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
    """Name the timing cache by GPU, TensorRT version and plugin version: a timing holds for one of each."""
    parts = f"{target.gpu}-sm{target.capability}-tensorrt{target.tensorrt}-{PLUGIN}"
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "nvlm-trt" / f"{re.sub('[^A-Za-z0-9._]+', '-', parts)}.timing"
