"""Writes engine directories as the build leaves them; in the place of an engine file stands the oracle's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nvlm_trt.backends.tensorrt_llm.contract import CONTAINER, VERSION
from nvlm_trt.builders.source import EngineSource
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.engine import Engine, Manifest, write_manifest
from nvlm_trt.model.layout import projector_layout, vision_layout

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def write_engine_directory(
    checkpoint: Path, directory: Path, dtype: str = "bf16", tp: int = 1, pp: int = 1, **limits: int
) -> Engine:
    """Writes an engine of `checkpoint`."""
    source = EngineSource(checkpoint, {"max_slots": 3, "max_seq_len": 512, **limits})
    directory.mkdir(parents=True)
    source.write_model_files(directory)
    with Checkpoint.open(checkpoint) as weights:
        names = vision_layout(source.config) | projector_layout(source.config)
        save(directory / "vision_encoder.safetensors", {name: weights.take(name).load() for name in names}, dtype)
        tags = source.tag_embeddings(weights)
        if tags is not None:
            save(directory / "tag_embeddings.safetensors", {"tag_embeddings": tags}, dtype)
    sizes = source.limits
    record = {
        "version": VERSION, "dtype": dtype, "tp": tp, "pp": pp, "form": "engine", "quantization": None,
        "kv_cache_quantization": None, "max_prompt_table": 300, "max_encoder_len": sizes.max_image_tokens,
        "max_num_tokens": 40, "container": CONTAINER,
    }  # fmt: skip
    built = {
        "version": VERSION,
        "pretrained_config": {
            "dtype": {"bf16": "bfloat16", "fp16": "float16"}[dtype],
            "mapping": {"tp_size": tp, "pp_size": pp, "world_size": tp * pp},
        },
        "build_config": {
            "max_batch_size": sizes.max_slots, "max_seq_len": sizes.max_seq_len, "max_num_tokens": 40,
            "max_input_len": sizes.max_seq_len,
            "max_prompt_embedding_table_size": 300 * sizes.max_slots,
            "max_encoder_input_len": sizes.max_image_tokens,
        },
    }  # fmt: skip
    (directory / "llm").mkdir()
    (directory / "llm" / "config.json").write_text(json.dumps(built))
    for rank in range(tp * pp):
        (directory / "llm" / f"rank{rank}.engine").write_text(str(checkpoint))
    manifest = Manifest(
        model_name=source.config.name,
        architecture=source.config.architecture,
        backend="tensorrt-llm",
        precision={"decoder": dtype},
        limits=sizes,
        checkpoint_digest=source.digest,
        tool_versions={},
        backend_record=record,
    )
    write_manifest(directory, manifest)
    return Engine.open(directory)


def rewrite(engine: Engine, **record: Any) -> Engine:
    """Changes the record of an engine, and notes the files as they are now."""
    manifest = engine.manifest.model_copy(
        update={"backend_record": {**(engine.manifest.backend_record or {}), **record}}
    )
    write_manifest(engine.path, manifest)
    return Engine.open(engine.path)


def save(path: Path, tensors: dict[str, Any], dtype: str) -> None:
    save_file({name: torch.from_numpy(array).to(DTYPES[dtype]) for name, array in tensors.items()}, path)
