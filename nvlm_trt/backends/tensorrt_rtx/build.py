"""Implements the steps of a build for TensorRT-RTX: graphs in TensorRT's form, checked and built into plans.

Without a GPU that the plans run on, ONNX Runtime tries and judges the same graphs on the CPU.
"""

from __future__ import annotations

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
from nvlm_trt.backends.tensorrt_rtx import SPEC
from nvlm_trt.backends.tensorrt_rtx.on_cpu import widen_file
from nvlm_trt.backends.tensorrt_rtx.options import RtxOptions
from nvlm_trt.backends.tensorrt_rtx.plan import build_plan
from nvlm_trt.backends.tensorrt_rtx.record import RtxRecord
from nvlm_trt.backends.tensorrt_rtx.target import find_gpu, import_rtx
from nvlm_trt.builders.build_steps import BuildJob, BuildSteps
from nvlm_trt.builders.graphs.cross_attention import MaskedAttention
from nvlm_trt.builders.quantization.calibration import Calibration
from nvlm_trt.builders.quantization.formats import Recipe, WeightForm
from nvlm_trt.evaluation.samples import Sample
from nvlm_trt.model.precision import floating_type
from nvlm_trt.planner.memory import plan_engine

ON_CPU = "the CPU: the plans' graphs in ONNX Runtime, float32 between operators"


class RtxSteps:
    """Implements `BuildSteps`.

    Raises EngineError without TensorRT-RTX, for a graph that TensorRT-RTX refuses, and if memory does not suffice; the
    message then names the expected memory."""

    tools: Sequence[str] = ("onnx", "onnx-ir", "onnxscript", "tensorrt_rtx_cu13_libs")
    weight_form = WeightForm.TENSORRT
    trial: BuildSteps | None = None

    def __init__(self, job: BuildJob) -> None:
        self._job = job
        self._options = RtxOptions.read(job.options)
        self._profiles = profiles_of(job.source.config, job.source.limits, PREFILL_CHUNK)
        self._gpu = find_gpu(self._options.targets)
        if self._gpu is None:
            self.trial = _OnCpuSteps(job)

    def unquantised(self, precisions: Mapping[str, str]) -> str:
        return floating_type(precisions)

    def calibrate(self, samples: Sequence[Sample]) -> Calibration:
        return calibrate(self._job, samples)

    def write_stages(self, directory: Path, recipe: Recipe) -> dict[str, Any] | None:
        """Write a plan per stage. The graphs, with all weights, are on disk beside the engine for that time."""
        source, progress, dtype = self._job.source, self._job.progress, floating_type(recipe.precisions)
        expected = plan_engine(source.design(SPEC, recipe.precisions))
        plans = UnfinishedPlans(self._job, directory)
        missing = [stage for stage in stages_of(source.config) if not plans.has(stage)]
        fused = {stage: plans.remembered(stage) for stage in self._profiles if stage not in missing}
        with plans.graphs_folder() as work:
            graphs = {}
            if missing:
                graphs = write_graphs(source, recipe, dtype, work, progress, MaskedAttention, plans.build)
            for done, stage in enumerate(missing):
                progress(f"building {stage}", done, len(missing))
                fuse = dtype != "fp32"  # float32 has no fused kernel
                fused[stage] = build_plan(
                    graphs[stage],
                    plans.plan(stage),
                    self._profiles[stage],
                    self._options,
                    fuse,
                    expected.host_building,
                )
                plans.finish(stage, fused[stage])
            progress("building", len(missing), len(missing))
        has_attention = {stage: fused[stage] for stage in sorted(fused) if fused[stage] is not None}
        return self._record(dtype, has_attention).model_dump()

    def _record(self, dtype: str, fused: dict[str, bool]) -> RtxRecord:
        return RtxRecord(
            version=import_rtx().__version__,
            targets=list(self._options.targets),
            dtype=dtype,
            fused=fused,
            aliased=aliases(self._job.source.config),
            profiles=self._profiles,
            weight_streaming=self._options.weight_streaming,
            tried_on=self._gpu or ON_CPU,
        )


class _OnCpuSteps:
    """Writes the engines that a build without a GPU tries in the place of its plans. Implements `BuildSteps`."""

    tools: Sequence[str] = ("onnx", "onnxruntime")
    weight_form = WeightForm.TENSORRT
    trial: BuildSteps | None = None

    def __init__(self, job: BuildJob) -> None:
        self._job = job

    def unquantised(self, precisions: Mapping[str, str]) -> str:
        return floating_type(precisions)

    def calibrate(self, samples: Sequence[Sample]) -> Calibration:
        return calibrate(self._job, samples)

    def write_stages(self, directory: Path, recipe: Recipe) -> dict[str, Any] | None:
        source, dtype = self._job.source, floating_type(recipe.precisions)
        graphs = write_graphs(source, recipe, dtype, directory, self._job.progress, MaskedAttention)
        for graph in graphs.values():
            widen_file(graph)
        record = RtxRecord(
            version=import_rtx().__version__,
            targets=[],
            dtype=dtype,
            fused={},
            aliased=aliases(source.config),
            profiles=profiles_of(source.config, source.limits, PREFILL_CHUNK),
            form="onnx",
            tried_on=ON_CPU,
        )
        return record.model_dump()
