"""Implements the steps of a build for ONNX Runtime: graphs in the forms that it runs fastest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nvlm_trt.backends.onnxruntime import NAME
from nvlm_trt.backends.onnxruntime.layer_parts import OnnxRuntimeParts
from nvlm_trt.backends.onnxruntime.observing import observe
from nvlm_trt.builders.build_steps import BuildJob, BuildSteps
from nvlm_trt.builders.engine_build import write_engine
from nvlm_trt.builders.graphs.cross_kv import cross_kv_graph
from nvlm_trt.builders.graphs.decoder import decoder_graph
from nvlm_trt.builders.graphs.self_attention import GroupQueryAttention
from nvlm_trt.builders.graphs.vision_attention import multi_head_vision_attention
from nvlm_trt.builders.graphs.vision_encoder import vision_encoder_graph
from nvlm_trt.builders.model_file import save_model
from nvlm_trt.builders.quantization.by_layer import PartRuntime, calibrate_by_layer
from nvlm_trt.builders.quantization.calibration import Calibration
from nvlm_trt.builders.quantization.formats import OBSERVING, Recipe, WeightForm
from nvlm_trt.builders.quantization.part_store import calibration_folder
from nvlm_trt.builders.quantization.smoothquant import MigratedWeights
from nvlm_trt.builders.source import EngineSource
from nvlm_trt.builders.unfinished_build import UnfinishedBuild
from nvlm_trt.errors import EngineError
from nvlm_trt.evaluation.samples import Sample
from nvlm_trt.extras import require
from nvlm_trt.progress import Progress
from nvlm_trt.staging import temporary_sibling

_TOOLS = ("onnx", "onnx-ir", "onnxscript", "onnxruntime")


class OnnxRuntimeSteps:
    """Implements `BuildSteps`."""

    tools: Sequence[str] = _TOOLS
    weight_form = WeightForm.ONNXRUNTIME
    trial: BuildSteps | None = None

    def __init__(self, job: BuildJob) -> None:
        self._job = job

    def unquantised(self, precisions: Mapping[str, str]) -> str:
        return "fp32" if "fp32" in (precisions["vision_encoder"], precisions["projector"]) else "bf16"

    def write_stages(self, directory: Path, recipe: Recipe) -> dict[str, Any] | None:
        write_graphs(self._job.source, self._job.progress, directory, recipe, self._job.unfinished_in(directory))
        return None

    def calibrate(self, samples: Sequence[Sample]) -> Calibration:
        return calibrate(self._job, samples)


def write_graphs(
    source: EngineSource,
    progress: Progress,
    directory: Path,
    recipe: Recipe,
    unfinished: UnfinishedBuild | None = None,
) -> None:
    """Write one ONNX file per stage. Together they hold every tensor of the checkpoint.

    `unfinished`: what remembers how far an interrupted build has come with the same files."""
    config, linear = source.config, recipe.weight_format
    with source.open_checkpoint() as checkpoint:
        weights = MigratedWeights(checkpoint, recipe.factors)
        graphs = {"vision_encoder": vision_encoder_graph(config, weights, linear, multi_head_vision_attention)}
        if config.cross_layers:
            graphs["cross_kv"] = cross_kv_graph(config, weights, source.tag_embeddings(checkpoint), linear)
        graphs["decoder"] = decoder_graph(
            config,
            weights,
            source.limits,
            linear,
            GroupQueryAttention,
            skip_unused=recipe.skip_unused,
        )
        checkpoint.finish()
        for stage, model in graphs.items():
            save_model(model, directory / f"{stage}.onnx", progress, unfinished)


def calibrate(job: BuildJob, samples: Sequence[Sample]) -> Calibration:
    """Measure a calibration: layer by layer, or with a temporary observing engine, written beside the engine that is
    built. On the CPU, both give the same.

    All backends calibrate here: the scales belong to the checkpoint, not to the engine."""
    if job.calibrates_by != "model":
        runtime = _parts_on_gpu(job.source) if job.calibrates_by == "layer-on-gpu" else OnnxRuntimeParts(job.source)
        return calibrate_by_layer(job.source, samples, calibration_folder(job.output), runtime, job.progress)
    with temporary_sibling(job.staging) as directory:
        write_stages = partial(write_graphs, job.source, job.progress)
        write_engine(job.source, directory, OBSERVING, NAME, _TOOLS, write_stages, progress=job.progress)
        return observe(directory, samples, job.progress)


def _parts_on_gpu(source: EngineSource) -> PartRuntime:
    require("reference", "a calibration on a GPU")
    import torch

    from nvlm_trt.builders.quantization.torch_parts import TorchParts

    if not torch.cuda.is_available():
        raise EngineError("PyTorch sees no GPU; install a PyTorch with CUDA, or choose --calibrate-by layer")
    return TorchParts(source, "cuda")
