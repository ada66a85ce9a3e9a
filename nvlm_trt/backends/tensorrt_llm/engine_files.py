"""Checks that trtllm-build's engines are those that the manifest describes, before the executor loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from nvlm_trt import strict_json
from nvlm_trt.backends.tensorrt_llm.contract import CONTAINER, VERSION
from nvlm_trt.backends.tensorrt_llm.record import TrtLlmRecord, record_of
from nvlm_trt.bounded_file import CONFIG_BYTES, read_bounded
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError

ENGINE_FOLDER = "llm"
CHECKPOINT_FOLDER = "checkpoint"


class _Mapping(BaseModel):
    tp_size: int = 1
    pp_size: int = 1


class _ModelPart(BaseModel):
    dtype: str
    mapping: _Mapping


class _BuildPart(BaseModel):
    max_batch_size: int
    max_seq_len: int
    max_input_len: int  # of a prompt
    max_num_tokens: int
    max_prompt_embedding_table_size: int = 0  # rows of all requests of a batch
    max_encoder_input_len: int = 0


class BuiltConfig(BaseModel):
    """The part of trtllm-build's config.json that must fit our manifest."""

    version: str
    pretrained_config: _ModelPart
    build_config: _BuildPart


def check_engine_files(engine: Engine) -> TrtLlmRecord:
    """Return the record of an engine that can be loaded. Raises EngineError for a checkpoint that was not built yet,
    for another version, and for engines that were built for other sizes than the manifest says."""
    record = record_of(engine)
    if record.form == "checkpoint":
        raise EngineError(
            f"engine {engine.path} holds a checkpoint for TensorRT-LLM that is not built yet; in the container "
            f"{record.container}, run `nvlm-trt build --continue {engine.path} --output ENGINE`"
        )
    if record.version != VERSION:
        raise EngineError(
            f"engine {engine.path} was built by TensorRT-LLM {record.version}, this nvlm-trt runs {VERSION}; rebuild "
            f"it in {CONTAINER}"
        )
    folder = engine.path / ENGINE_FOLDER
    for rank in range(record.ranks):
        if not (folder / f"rank{rank}.engine").is_file():
            raise EngineError(f"engine file {folder / f'rank{rank}.engine'} is missing; rebuild the engine")
    _compare(folder / "config.json", _read(folder / "config.json"), engine, record)
    return record


def _read(path: Path) -> BuiltConfig:
    try:
        return BuiltConfig.model_validate(strict_json.loads(read_bounded(path, CONFIG_BYTES).decode()))
    except (OSError, ValueError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise EngineError(f"{path} is not trtllm-build's config ({reason}); rebuild the engine") from None


def _compare(path: Path, built: BuiltConfig, engine: Engine, record: TrtLlmRecord) -> None:
    build, mapping, limits = built.build_config, built.pretrained_config.mapping, engine.limits
    equal: list[tuple[str, Any, Any]] = [
        ("version", built.version, record.version),
        ("dtype", built.pretrained_config.dtype, {"bf16": "bfloat16", "fp16": "float16"}[record.dtype]),
        ("tp_size", mapping.tp_size, record.tp),
        ("pp_size", mapping.pp_size, record.pp),
    ]
    for name, found, wanted in equal:
        if found != wanted:
            raise EngineError(f"{path} has {name} {found}, the manifest says {wanted}; rebuild the engine")
    table_rows = build.max_prompt_embedding_table_size // max(build.max_batch_size, 1)
    at_least = [
        ("max_batch_size", build.max_batch_size, limits.max_slots),
        ("max_seq_len", build.max_seq_len, limits.max_seq_len),
        ("max_input_len", build.max_input_len, limits.max_seq_len - 1),
        ("max_num_tokens", build.max_num_tokens, record.max_num_tokens),
        ("max_prompt_embedding_table_size / max_batch_size", table_rows, record.max_prompt_table),
    ]
    if engine.config.cross_layers:
        at_least.append(("max_encoder_input_len", build.max_encoder_input_len, record.max_encoder_len))
        at_least.append(("max_encoder_input_len", build.max_encoder_input_len, limits.max_image_tokens))
    for name, size, needed in at_least:
        if size < needed:
            raise EngineError(f"{path} has {name} {size}, the manifest promises {needed}; rebuild the engine")
