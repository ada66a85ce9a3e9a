"""Writes the graphs of an engine in the form that NVIDIA's builders take."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from nvlm_trt.builders.graphs.cross_attention import CrossAttention, GatedFunction
from nvlm_trt.builders.graphs.cross_kv import cross_kv_graph
from nvlm_trt.builders.graphs.decoder import decoder_graph
from nvlm_trt.builders.graphs.self_attention import TensorRtAttention
from nvlm_trt.builders.graphs.vision_attention import tensorrt_vision_attention
from nvlm_trt.builders.graphs.vision_encoder import vision_encoder_graph
from nvlm_trt.builders.model_file import save_model
from nvlm_trt.builders.quantization.formats import Recipe
from nvlm_trt.builders.quantization.smoothquant import MigratedWeights
from nvlm_trt.builders.source import EngineSource
from nvlm_trt.builders.unfinished_build import UnfinishedBuild
from nvlm_trt.progress import Progress

DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def write_graphs(
    source: EngineSource,
    recipe: Recipe,
    dtype_name: str,
    directory: Path,
    progress: Progress,
    cross_attention: type[CrossAttention] = GatedFunction,
    unfinished: UnfinishedBuild | None = None,
) -> dict[str, Path]:
    """Write one ONNX file per stage in TensorRT's form, weights beside it. Return stage -> file.

    `unfinished`: what remembers how far an interrupted build has come with the same files.

    Together the files hold every tensor of the checkpoint. `dtype_name`, a key of DTYPES, is the type of everything
    that is not quantised."""
    config, dtype, linear = source.config, DTYPES[dtype_name], recipe.weight_format
    with source.open_checkpoint() as checkpoint:
        weights = MigratedWeights(checkpoint, recipe.factors)
        graphs = {"vision_encoder": vision_encoder_graph(config, weights, linear, tensorrt_vision_attention, dtype)}
        if config.cross_layers:
            graphs["cross_kv"] = cross_kv_graph(config, weights, source.tag_embeddings(checkpoint), linear, dtype)
        graphs["decoder"] = decoder_graph(
            config, weights, source.limits, linear, TensorRtAttention, cross_attention, dtype=dtype
        )
        checkpoint.finish()
        for stage, model in graphs.items():
            save_model(model, directory / f"{stage}.onnx", progress, unfinished)
    return {stage: directory / f"{stage}.onnx" for stage in graphs}
