"""A checkpoint -> an engine for ONNX Runtime: build the graphs, stream the weights, try the engine, publish it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
from pydantic import ValidationError

from nvlm_trt.backends.base import COMPONENTS, FloatArray
from nvlm_trt.builders.graphs.common import Float32, WeightFormat
from nvlm_trt.builders.graphs.cross_kv import cross_kv_graph
from nvlm_trt.builders.graphs.decoder import decoder_graph
from nvlm_trt.builders.graphs.int8 import Int8WeightOnly
from nvlm_trt.builders.graphs.vision_encoder import vision_encoder_graph
from nvlm_trt.builders.smoke_test import SmokeTest
from nvlm_trt.checkpoint import Checkpoint
from nvlm_trt.config import NvlmConfig
from nvlm_trt.engine import Engine, EngineLimits, Manifest, publish, tool_versions, write_manifest
from nvlm_trt.errors import EngineError
from nvlm_trt.hf_config import config_to_hf
from nvlm_trt.layout import EMBEDDING
from nvlm_trt.progress import Progress, no_progress
from nvlm_trt.prompt import PromptEncoder, split_tiles
from nvlm_trt.tokenizer import TOKENIZER_FILES, Tokenizer

_DEFAULT_IMAGES = 4  # of the most tiles each, that one request may cross-attend to

# Formats of all components by the name that `precision` has. Quantised vision encoders and projectors misread small
# print, and cross_kv runs once per image: both stay fp32.
PRECISIONS: dict[str, dict[str, WeightFormat]] = {
    "fp32": {component: Float32() for component in COMPONENTS},
    "int8-weight-only": {component: Float32() for component in COMPONENTS} | {"decoder": Int8WeightOnly()},
}


def build_engine(
    checkpoint_dir: Path | str,
    output: Path | str,
    overrides: Mapping[str, int] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    smoke_test: bool = True,
    precision: str = "fp32",
) -> Engine:
    """Publish the engine of a checkpoint as the directory `output`; on any failure nothing is left there.

    `overrides` replaces fields of `default_limits`; `precision` is a name in PRECISIONS. Memory does not grow with the
    model, save for the smoke test, which loads the engine and generates from text and from an image. Raises
    CheckpointError, ConfigError for the checkpoint and EngineError for precision, limits, an existing `output`, a full
    disk or an engine that speaks nonsense."""
    progress = progress or no_progress
    if precision not in PRECISIONS:
        raise EngineError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}; choose with --precision")
    formats = PRECISIONS[precision]
    with Checkpoint.open(checkpoint_dir) as checkpoint, publish(output, overwrite) as staging:
        config = checkpoint.config
        prompts = PromptEncoder(config, Tokenizer.from_directory(checkpoint_dir))
        limits = _limits(config, prompts.tag_length, overrides or {})
        trial = SmokeTest(prompts, limits, config)
        graphs = _build_graphs(checkpoint, prompts, limits, formats)
        (staging / "config.json").write_text(json.dumps(config_to_hf(config), indent=2) + "\n", encoding="utf-8")
        for name in TOKENIZER_FILES:
            if (Path(checkpoint_dir) / name).exists():
                shutil.copyfile(Path(checkpoint_dir) / name, staging / name)
        for component, model in graphs.items():
            save_model(model, staging / f"{component}.onnx", progress)
        manifest = Manifest(
            model_name=config.name,
            architecture=config.architecture,
            backend="onnxruntime",
            precision={component: formats[component].precision for component in graphs},
            limits=limits,
            checkpoint_digest=checkpoint.digest,
            tool_versions=tool_versions("onnx", "onnx-ir", "onnxscript", "onnxruntime"),
        )
        write_manifest(staging, manifest)
        if smoke_test:
            progress("smoke test", 0, 1)
            trial.run(Engine.open(staging))
            progress("smoke test", 1, 1)
    return Engine.open(output)


def default_limits(config: NvlmConfig, tag_length: int) -> EngineLimits:
    """8 requests at once, up to 4096 tokens each, and room for four images of the most tiles in cross-attention."""
    _, in_cross = split_tiles(config.architecture, config.tiles_per_image)
    cross_tiles = len(range(config.tiles_per_image)[in_cross])
    return EngineLimits(
        max_slots=8,
        max_seq_len=min(4096, config.llm.max_position_embeddings),
        max_image_tokens=_DEFAULT_IMAGES * cross_tiles * config.cross_tokens_per_tile(tag_length),
        max_tiles=config.max_tiles,
    )


def _limits(config: NvlmConfig, tag_length: int, overrides: Mapping[str, int]) -> EngineLimits:
    default = default_limits(config, tag_length)
    try:
        limits = EngineLimits(**{**default.model_dump(), **overrides})
    except ValidationError as error:
        first = error.errors()[0]
        raise EngineError(f"limit {first['loc'][0]}: {first['msg']}; the default is {default}") from None
    if limits.max_seq_len > config.llm.max_position_embeddings:
        raise EngineError(
            f"max_seq_len {limits.max_seq_len} is beyond the model's {config.llm.max_position_embeddings} positions; "
            "choose a smaller --max-seq-len"
        )
    if limits.max_tiles > config.max_tiles:
        raise EngineError(f"max_tiles {limits.max_tiles} is beyond the model's {config.max_tiles}; choose fewer")
    if config.cross_layers and not limits.max_image_tokens:
        raise EngineError(f"NVLM-{config.architecture} needs max_image_tokens; choose --max-image-tokens above 0")
    return limits


def _build_graphs(
    checkpoint: Checkpoint, prompts: PromptEncoder, limits: EngineLimits, formats: Mapping[str, WeightFormat]
) -> dict[str, ir.Model]:
    """The graphs by component, in the forms that ONNX Runtime runs fastest; every tensor of the checkpoint in one."""
    config = checkpoint.config
    graphs = {"vision_encoder": vision_encoder_graph(config, checkpoint, formats["vision_encoder"], attention="mha")}
    if config.cross_layers:
        tags = _tag_embeddings(checkpoint, prompts)
        graphs["cross_kv"] = cross_kv_graph(config, checkpoint, tags, formats["cross_kv"])
    graphs["decoder"] = decoder_graph(config, checkpoint, limits, formats["decoder"], attention="gqa")
    checkpoint.finish()
    return graphs


def _tag_embeddings(checkpoint: Checkpoint, prompts: PromptEncoder) -> FloatArray | None:
    """[max_tiles, tag_length, hidden] of NVLM-H's tile tags."""
    config = checkpoint.config
    if config.architecture != "H":
        return None
    tags = prompts.tag_ids(config.max_tiles)
    return checkpoint.rows(EMBEDDING, tags.reshape(-1)).reshape(*tags.shape, config.llm.hidden_size)


def save_model(model: ir.Model, path: Path, progress: Progress) -> None:
    """Write PATH and PATH.data, one tensor in memory at a time, and check the result."""

    def report(tensor: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        progress(path.stem, info.index + 1, info.total)

    # page-aligned, so that ONNX Runtime maps what it does not repack
    ir.save(model, path, external_data=f"{path.name}.data", alignment=4096, callback=report)
    onnx.checker.check_model(os.fspath(path))
