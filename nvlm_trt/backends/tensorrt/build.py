"""Implements the steps of a build for TensorRT: graphs in TensorRT's form, checked and built into plans."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nvlm_trt.backends.base import stages_of
from nvlm_trt.backends.onnxruntime.build import calibrate
from nvlm_trt.backends.plans import PREFILL_CHUNK
from nvlm_trt.backends.plans.graphs import write_graphs
from nvlm_trt.backends.plans.profiles import profiles_of
from nvlm_trt.backends.plans.record import aliases
from nvlm_trt.backends.plans.unfinished_plans import UnfinishedPlans
from nvlm_trt.backends.tensorrt import SPEC
from nvlm_trt.backends.tensorrt.options import PlanOptions
from nvlm_trt.backends.tensorrt.plan import build_plan
from nvlm_trt.backends.tensorrt.record import TensorRtRecord
from nvlm_trt.backends.tensorrt.target import Target, find_target
from nvlm_trt.builders.build_steps import BuildJob, BuildSteps
from nvlm_trt.builders.graphs.cross_attention import CrossAttention, GatedFunction, MaskedAttention
from nvlm_trt.builders.quantization.calibration import Calibration
from nvlm_trt.builders.quantization.formats import Recipe, WeightForm
from nvlm_trt.errors import EngineError
from nvlm_trt.evaluation.samples import Sample
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.precision import floating_type
from nvlm_trt.planner.memory import plan_engine
from nvlm_trt.plugins.gated_cross_attention.blocks import HEAD_DIMS
from nvlm_trt.plugins.gated_cross_attention.onnx_function import NAME, PLUGIN_ATTRIBUTES
from nvlm_trt.plugins.gated_cross_attention.tensorrt_plugin import register_plugin

PLUGIN = f"{PLUGIN_ATTRIBUTES['plugin_namespace']}::{NAME}"


class TensorRtSteps:
    """Implements `BuildSteps` for the TensorRT and the GPU of this machine.

    Raises EngineError without TensorRT or a GPU, for a graph that TensorRT refuses, and if memory does not suffice; the
    message then names the expected memory."""

    tools: Sequence[str] = ("onnx", "onnx-ir", "onnxscript", "polygraphy")
    weight_form = WeightForm.TENSORRT
    trial: BuildSteps | None = None

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
        plugin = takes_plugin(source.config)
        if plugin:
            _register_plugin(self._target)
        self._write_plans(recipe, dtype, directory, GatedFunction if plugin else MaskedAttention)
        return self._record(dtype, PLUGIN if plugin else None).model_dump()

    def _write_plans(self, recipe: Recipe, dtype: str, directory: Path, cross_attention: type[CrossAttention]) -> None:
        source, progress = self._job.source, self._job.progress
        expected = plan_engine(source.design(SPEC, recipe.precisions)).stages
        plans = UnfinishedPlans(self._job, directory)
        missing = [stage for stage in stages_of(source.config) if not plans.has(stage)]
        with plans.graphs_folder() as work:
            # loading a stripped plan refits it from its graph, so the graph stays beside the plan
            beside = directory if self._options.strip_weights else work
            graphs = {}
            if missing or self._options.strip_weights:
                graphs = write_graphs(source, recipe, dtype, beside, progress, cross_attention, plans.build)
            cache = timing_cache_path(self._target)
            for done, stage in enumerate(missing):
                progress(f"building {stage}", done, len(missing))
                profiles, plan = self._profiles[stage], plans.plan(stage)
                build_plan(graphs[stage], plan, profiles, self._options, cache, expected[stage])
                plans.finish(stage)
            progress("building", len(missing), len(missing))

    def _record(self, dtype: str, plugin: str | None) -> TensorRtRecord:
        return TensorRtRecord(
            version=self._target.tensorrt,
            capability=self._target.capability,
            gpu=self._target.gpu,
            container=self._target.container,
            dtype=dtype,
            plugin=plugin,
            aliased=aliases(self._job.source.config),
            profiles=self._profiles,
            stripped=self._options.strip_weights,
            weight_streaming=self._options.weight_streaming,
        )


def takes_plugin(config: NvlmConfig) -> bool:
    """Return whether the plugin computes the model's cross-attention. For heads of other sizes, TensorRT's own masked
    attention does, over the whole cache."""
    return bool(config.cross_layers) and config.llm.head_dim in HEAD_DIMS


def _register_plugin(target: Target) -> None:
    try:
        register_plugin(target.capability)
    except ImportError as error:
        raise EngineError(f"the plugin's kernel is compiled by triton ({error}); `pip install triton`") from None


def timing_cache_path(target: Target) -> Path:
    """Name the timing cache by GPU, TensorRT version and plugin version: a timing holds for one of each."""
    parts = f"{target.gpu}-sm{target.capability}-tensorrt{target.tensorrt}-{PLUGIN}"
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "nvlm-trt" / f"{re.sub('[^A-Za-z0-9._]+', '-', parts)}.timing"
