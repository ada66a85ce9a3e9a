"""Describes a checkpoint directory as it is, whole or not, by its headers and side files. Reads no tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from nvlm_trt.checkpoint.accounting import Accounting, account
from nvlm_trt.checkpoint.file_state import FileState, Kind, TensorRecord, file_state
from nvlm_trt.checkpoint.safetensors_file import FLOAT_DTYPES
from nvlm_trt.checkpoint.stored_names import layout_name
from nvlm_trt.checkpoint.weight_files import weight_files
from nvlm_trt.errors import CheckpointError, ConfigError, NvlmError
from nvlm_trt.model.components import OTHER, PARTS, part_of
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.hf_config import config_from_hf, read_raw_config
from nvlm_trt.model.quantised_source import FP8_DTYPE, Fp8Scheme, read_scheme
from nvlm_trt.prompt.encoder import PromptEncoder
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.prompt.tokenizer_files import chat_template_file


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Part(_Record):
    """Tensors of one part of the model."""

    tensors: int
    parameters: int
    nbytes: dict[str, int]  # dtype -> bytes


class Shard(_Record):
    """A weight file."""

    name: str
    state: Kind
    nbytes: int  # on the disk
    whole_nbytes: int | None  # of the whole file; None: unknown


class TokenizerFound(_Record):
    """The tokenizer, and what else the folder says of prompts."""

    ids: int
    chat_template: str | None  # the file that has it; answers are asked for in ChatML, whatever it says
    stop_tokens: list[str]


class Inspection(_Record):
    """All that is known of a checkpoint directory. A build is possible if `faults` is empty."""

    directory: str
    model: dict[str, Any] | None  # None: config.json cannot be used
    shards: list[Shard]
    quantised: str | None  # the scheme, if it is one that can be read
    parts: dict[str, Part]
    tokenizer: TokenizerFound | None
    missing: list[str]  # tensors
    unexpected: list[str]
    skipped: list[str]  # tensors that no NVLM model reads
    faults: list[str]  # one line each: what, where, what to do

    @property
    def nbytes(self) -> int:
        return sum(nbytes for part in self.parts.values() for nbytes in part.nbytes.values())


def inspect_checkpoint(directory: Path | str) -> Inspection:
    """Inspect a checkpoint. Raises ConfigError for a place that is no folder; every other fault is in the result."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a folder; name a checkpoint directory in HF layout")
    faults: list[str] = []
    raw = _raw_config(directory, faults)
    config = _config(raw, directory, faults) if raw is not None else None
    states = [file_state(directory / name) for name in _file_names(directory, faults)]
    faults += [state.fault for state in states if state.fault is not None]
    records = _records(states, faults)
    tokenizer = _tokenizer(directory, config, faults)
    scheme = _scheme(raw, directory, faults) if raw is not None and config is not None else None
    accounting = account(config, records, scheme) if config is not None else None
    if accounting is not None:
        whole = bool(states) and all(state.kind == "whole" for state in states)
        faults += _tensor_faults(directory, accounting, records, scheme, whole)
    return Inspection(
        directory=str(directory),
        model=_described(config) if config is not None else None,
        shards=[
            Shard(name=state.path.name, state=state.kind, nbytes=state.nbytes, whole_nbytes=state.whole_nbytes)
            for state in states
        ],
        quantised=str(scheme) if scheme else None,
        parts=_parts(records),
        tokenizer=tokenizer,
        missing=list(accounting.missing) if accounting else [],
        unexpected=list(accounting.unexpected) if accounting else [],
        skipped=list(accounting.skipped) if accounting else [],
        faults=faults,
    )


def _raw_config(directory: Path, faults: list[str]) -> dict[str, Any] | None:
    try:
        return read_raw_config(directory)
    except ConfigError as error:
        faults.append(str(error))
        return None


def _config(raw: Mapping[str, Any], directory: Path, faults: list[str]) -> NvlmConfig | None:
    try:
        return config_from_hf(raw, name=directory.resolve().name)
    except ConfigError as error:
        faults.append(str(error))
        return None


def _scheme(raw: Mapping[str, Any], directory: Path, faults: list[str]) -> Fp8Scheme | None:
    try:
        return read_scheme(raw, directory)
    except ConfigError as error:
        faults.append(str(error))
        return None


def _file_names(directory: Path, faults: list[str]) -> tuple[str, ...]:
    """List the weight files; where they cannot be told apart, all that there are."""
    try:
        return weight_files(directory)
    except CheckpointError as error:
        faults.append(str(error))
        return tuple(sorted(path.name for path in directory.glob("*.safetensors")))


def _records(states: list[FileState], faults: list[str]) -> dict[str, TensorRecord]:
    """Merge the headers, with the names that the layout has."""
    records: dict[str, TensorRecord] = {}
    place: dict[str, str] = {}
    twice: list[str] = []
    for state in states:
        for stored, record in state.records.items():
            name = layout_name(stored)
            if name in records:
                twice.append(
                    f"tensor {name} is in both {place[name]} and {state.path.name}; write the checkpoint again"
                )
            records[name], place[name] = record, state.path.name
    faults += twice[:1]
    return records


def _tensor_faults(
    directory: Path,
    accounting: Accounting,
    records: Mapping[str, TensorRecord],
    scheme: Fp8Scheme | None,
    whole: bool,
) -> list[str]:
    """Say what keeps the tensors from being a model of config.json. Tensors of files that are not `whole` are missing
    for that reason."""
    faults = []
    if accounting.missing and whole:
        faults.append(
            f"{directory} has no {_several(accounting.missing)}, which config.json asks for; restore the missing "
            "shard or correct config.json"
        )
    if accounting.unexpected:
        faults.append(
            f"{directory} has {_several(accounting.unexpected)}, which a model of config.json does not use; correct "
            "config.json or remove the tensor"
        )
    if accounting.misshapen:
        tensor = accounting.misshapen[0]
        faults.append(
            f"{_several([entry.name for entry in accounting.misshapen])} has shape {list(tensor.stored)}, config.json "
            f"asks for {list(tensor.wanted)}; correct config.json or write the checkpoint again"
        )
    ignored = {*accounting.unexpected, *accounting.skipped}
    readable = (*FLOAT_DTYPES, FP8_DTYPE) if scheme else FLOAT_DTYPES
    unread = [name for name, record in records.items() if record.dtype not in readable and name not in ignored]
    if unread:
        faults.append(
            f"{_several(unread)} is stored as {records[unread[0]].dtype}; convert the checkpoint to BF16, F16 or F32"
        )
    return faults


def _several(names: tuple[str, ...] | list[str]) -> str:
    return f"tensor {names[0]}" + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _parts(records: Mapping[str, TensorRecord]) -> dict[str, Part]:
    tensors: dict[str, list[TensorRecord]] = defaultdict(list)
    for name, record in records.items():
        tensors[part_of(name)].append(record)
    parts = {}
    for part in (*PARTS, OTHER):
        nbytes: dict[str, int] = defaultdict(int)
        for record in tensors[part]:
            nbytes[record.dtype] += record.nbytes
        if tensors[part]:
            parameters = sum(record.parameters for record in tensors[part])
            parts[part] = Part(tensors=len(tensors[part]), parameters=parameters, nbytes=dict(nbytes))
    return parts


def _tokenizer(directory: Path, config: NvlmConfig | None, faults: list[str]) -> TokenizerFound | None:
    try:
        tokenizer = Tokenizer.from_directory(directory)
        if config is not None:
            PromptEncoder(config, tokenizer)  # the tokenizer is of this model
    except NvlmError as error:
        faults.append(str(error))
        return None
    return TokenizerFound(
        ids=tokenizer.vocab_size,
        chat_template=chat_template_file(directory),
        stop_tokens=[tokenizer.token_text(token_id) for token_id in sorted(tokenizer.stop_ids)],
    )


def _described(config: NvlmConfig) -> dict[str, Any]:
    """Name the sizes that tell one model from another."""
    vision, llm = config.vision, config.llm
    return {
        "name": config.name,
        "architecture": config.architecture,
        "vision_layers": vision.num_layers,
        "vision_hidden_size": vision.hidden_size,
        "tile_pixels": vision.image_size,
        "tokens_per_tile": config.tokens_per_tile,
        "max_tiles": config.max_tiles,
        "llm": llm.family,
        "llm_layers": llm.num_layers,
        "llm_hidden_size": llm.hidden_size,
        "heads": llm.num_heads,
        "kv_heads": llm.num_kv_heads,
        "vocab_size": llm.vocab_size,
        "context": llm.max_position_embeddings,
        "tied_embeddings": llm.tie_word_embeddings,
        "cross_attention_layers": len(config.cross_layers),
    }
