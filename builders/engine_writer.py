"""The files of an engine for ONNX Runtime: graphs, streamed weights, config, tokenizer and manifest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
from pydantic import ValidationError

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.builders.graphs.cross_kv import cross_kv_graph
from nvlm_trt.builders.graphs.decoder import decoder_graph
from nvlm_trt.builders.graphs.self_attention import GroupQueryAttention
from nvlm_trt.builders.graphs.vision_attention import multi_head_vision_attention
from nvlm_trt.builders.graphs.vision_encoder import vision_encoder_graph
from nvlm_trt.builders.quantization.formats import Recipe
from nvlm_trt.builders.quantization.smoothquant import MigratedWeights
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.engine import EngineLimits, Manifest, tool_versions, write_manifest
from nvlm_trt.errors import EngineError
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.hf_config import config_to_hf
from nvlm_trt.model.layout import EMBEDDING
from nvlm_trt.model.precision import components_of
from nvlm_trt.progress import Progress
from nvlm_trt.prompt.encoder import PromptEncoder, count_image_tokens
from nvlm_trt.prompt.tokenizer import TOKENIZER_FILES, Tokenizer

_DEFAULT_IMAGES = 4  # of the most tiles each, that one request may cross-attend to


class EngineWriter:
    """Writes engines of one checkpoint: the one that is published, and those that it is measured against."""

    def __init__(self, checkpoint_dir: Path | str, overrides: Mapping[str, int]) -> None:
        """`overrides` replaces fields of `default_limits`. Hashes the checkpoint, once for all engines.

        Raises CheckpointError, ConfigError for the checkpoint and EngineError for limits."""
        self.checkpoint_dir = Path(checkpoint_dir)
        with Checkpoint.open(checkpoint_dir) as checkpoint:
            self.config = checkpoint.config
            self.prompts = PromptEncoder(self.config, Tokenizer.from_directory(checkpoint_dir))
            self.limits = engine_limits(self.config, self.prompts.tag_length, overrides)
            self.digest = checkpoint.digest

    def write(self, directory: Path, recipe: Recipe, progress: Progress) -> Manifest:
        """Fill an empty directory. Memory does not grow with the model. Raises EngineError for a full disk."""
        with Checkpoint.open(self.checkpoint_dir) as checkpoint:
            graphs = self._build_graphs(checkpoint, recipe)
            self.write_model_files(directory)
            for component, model in graphs.items():
                save_model(model, directory / f"{component}.onnx", progress)
        manifest = Manifest(
            model_name=self.config.name,
            architecture=self.config.architecture,
            backend="onnxruntime",
            precision={component: recipe.precisions[component] for component in components_of(self.config)},
            limits=self.limits,
            checkpoint_digest=self.digest,
            tool_versions=tool_versions("onnx", "onnx-ir", "onnxscript", "onnxruntime"),
            calibration=recipe.calibration,
        )
        write_manifest(directory, manifest)
        return manifest

    def write_model_files(self, directory: Path) -> None:
        """config.json and the tokenizer's files."""
        config_json = json.dumps(config_to_hf(self.config), indent=2) + "\n"
        (directory / "config.json").write_text(config_json, encoding="utf-8")
        for name in TOKENIZER_FILES:
            if (self.checkpoint_dir / name).exists():
                shutil.copyfile(self.checkpoint_dir / name, directory / name)

    def _build_graphs(self, checkpoint: Checkpoint, recipe: Recipe) -> dict[str, ir.Model]:
        """The graphs by file, in the forms that ONNX Runtime runs fastest; every tensor of the checkpoint in one."""
        config, linear = self.config, recipe.weight_format
        weights = MigratedWeights(checkpoint, recipe.factors)
        graphs = {
            "vision_encoder": vision_encoder_graph(config, weights, linear, attention=multi_head_vision_attention)
        }
        if config.cross_layers:
            tags = self.tag_embeddings(checkpoint)
            graphs["cross_kv"] = cross_kv_graph(config, weights, tags, linear)
        graphs["decoder"] = decoder_graph(
            config,
            weights,
            self.limits,
            linear,
            attention=GroupQueryAttention,
            skip_unused_blocks=recipe.skip_unused_blocks,
        )
        checkpoint.finish()
        return graphs

    def tag_embeddings(self, checkpoint: Checkpoint) -> FloatArray | None:
        """[max_tiles, tag_length, hidden] of NVLM-H's tile tags."""
        if self.config.architecture != "H":
            return None
        tags = self.prompts.tag_ids(self.config.max_tiles)
        return checkpoint.rows(EMBEDDING, tags.reshape(-1)).reshape(*tags.shape, self.config.llm.hidden_size)


def default_limits(config: NvlmConfig, tag_length: int) -> EngineLimits:
    """8 requests at once, up to 4096 tokens each, and room for four images of the most tiles in cross-attention."""
    _, cross_tokens = count_image_tokens(config, config.tiles_per_image, tag_length)
    return EngineLimits(
        max_slots=8,
        max_seq_len=min(4096, config.llm.max_position_embeddings),
        max_image_tokens=_DEFAULT_IMAGES * cross_tokens,
        max_tiles=config.max_tiles,
    )


def engine_limits(config: NvlmConfig, tag_length: int, overrides: Mapping[str, int]) -> EngineLimits:
    """`default_limits` with the fields of `overrides`. Raises EngineError for what the model cannot do."""
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


def save_model(model: ir.Model, path: Path, progress: Progress) -> None:
    """Write PATH and PATH.data, some rows of a tensor in memory at a time, and check the result."""

    def report(tensor: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        progress(path.stem, info.index + 1, info.total)

    # page-aligned, so that ONNX Runtime maps what it does not repack
    ir.save(model, path, external_data=f"{path.name}.data", alignment=4096, callback=report)
    onnx.checker.check_model(os.fspath(path))
