"""Reads checkpoints in HF layout, config.json, tokenizer.json and safetensors shards, a tensor or some rows at a time.

Checks names and shapes against `layout` when a checkpoint is opened. Every tensor has to be taken exactly once: a
loader that silently skips weights builds cleanly and speaks nonsense.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nvlm_trt.checkpoint.accounting import Accounting, account, dummy_channels, has_tied_copy
from nvlm_trt.checkpoint.dummy_heads import PROJECTION, real_heads
from nvlm_trt.checkpoint.file_state import TensorRecord
from nvlm_trt.checkpoint.safetensors_file import FloatArray, SafetensorsFile
from nvlm_trt.checkpoint.weight_files import weight_files
from nvlm_trt.closing import ClosedOnExit
from nvlm_trt.errors import CheckpointError
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.hf_config import config_to_hf, read_config
from nvlm_trt.model.layout import EMBEDDING, LM_HEAD, checkpoint_layout

# The digest hashes checkpoints up to this size whole (seconds), and samples of larger ones.
_FULL_DIGEST_BYTES = 4 << 30
_SAMPLE_BYTES = 4096
_SAMPLES = 64
_TIED_ROWS = 256  # compared at a time


@dataclass(frozen=True)
class LazyWeight:
    """A tensor that every call of `load` and `rows` reads again; valid while its checkpoint is open."""

    name: str
    shape: tuple[int, ...]
    file: SafetensorsFile

    def load(self) -> FloatArray:
        """Reads the tensor as a new float32 array, without dummy heads. BF16, F16 and F32 convert exactly."""
        stored = self.file.load(self.name)
        return stored if stored.shape == self.shape else real_heads(self.name, stored, self.shape)

    def rows(self, start: int, stop: int) -> FloatArray:
        """Reads rows [start, stop) of the array that `load` returns, [stop - start, ...], and no others."""
        record = self.file.records[self.name]
        if record.shape != self.shape:
            return self._real_rows(start, stop, record.shape)
        out = np.empty((stop - start, *self.shape[1:]), np.float32)
        self.file.read_floats(self.name, record, start * math.prod(self.shape[1:]), out.reshape(-1))
        return out

    def _real_rows(self, start: int, stop: int, stored: tuple[int, ...]) -> FloatArray:
        """Reads rows of a tensor that is stored with dummy heads."""
        if len(self.shape) == 1:  # small
            return self.load()[start:stop]
        parts = 3 if ".attn.qkv." in self.name else 1  # q, k and v, each with dummy heads behind its own
        part, row = np.divmod(np.arange(start, stop), self.shape[0] // parts)
        rows = self.file.load_rows(self.name, part * (stored[0] // parts) + row)
        return np.ascontiguousarray(rows[:, : self.shape[1]])


class Checkpoint(ClosedOnExit):
    """An open checkpoint whose names and shapes match its config. A context manager."""

    def __init__(self, directory: Path, config: NvlmConfig, files: Sequence[SafetensorsFile]) -> None:
        self.directory = directory
        self.config = config
        self._files = files
        self._layout = checkpoint_layout(config)
        self._file_of = _locate(directory, files)
        self._remaining = dict.fromkeys(self._layout)
        records = {name: file.records[name] for name, file in self._file_of.items()}
        self._padding = dummy_channels(config, records)
        self._has_tied_copy = has_tied_copy(config, records)
        self._check_tensors(account(config, records))

    @classmethod
    def open(cls, directory: Path | str) -> Checkpoint:
        """Checks every header against config.json; reads no tensor.

        Raises ConfigError, or CheckpointError naming a tensor that is missing, not expected or misshapen, or a
        file that is missing, truncated or corrupt."""
        directory = Path(directory)
        config = read_config(directory)
        with contextlib.ExitStack() as opened:
            files = []
            for name in weight_files(directory):
                files.append(SafetensorsFile(directory / name))
                opened.callback(files[-1].close)
            checkpoint = cls(directory, config, files)
            opened.pop_all()
        return checkpoint

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors that have to be taken, in layout order."""
        return tuple(self._layout)

    @property
    def digest(self) -> str:
        """Hashes (sha256) the config and every tensor's name, dtype, shape and data, but not model name and shards.

        Hashes up to 4 GiB of data whole (about 1 s per GB). Takes 64 blocks of 4 KiB from each tensor of more than
        256 KiB in a larger checkpoint, evenly spaced from its first byte to its last: sees training, merging and
        quantising, which change nearly every element, but not an edit of a few elements between the blocks."""
        records = {name: self._file_of[name].records[name] for name in sorted(self._layout)}
        sampled = sum(record.nbytes for record in records.values()) > _FULL_DIGEST_BYTES
        digest = hashlib.sha256(
            json.dumps(config_to_hf(replace(self.config, name="")), sort_keys=True, allow_nan=False).encode()
        )
        for name, record in records.items():
            digest.update(f"\n{name} {record.dtype} {record.shape}\n".encode())
            for block in _samples(self._file_of[name], record) if sampled else self._file_of[name].blocks(record):
                digest.update(block)
        return digest.hexdigest()

    def take(self, name: str) -> LazyWeight:
        """Consumes a tensor. Raises CheckpointError when it was taken before or is not in the layout."""
        if name not in self._layout:
            raise CheckpointError(f"tensor {name} is not in the layout of NVLM-{self.config.architecture}")
        if name not in self._remaining:
            raise CheckpointError(f"tensor {name} was taken twice; every tensor is consumed exactly once")
        del self._remaining[name]
        if self._padding and (match := PROJECTION.fullmatch(name)):
            self._check_dummy_heads(match[1])
        if name == EMBEDDING and self._has_tied_copy:
            self._check_tied_copy()
        return LazyWeight(name, self._layout[name], self._file_of[name])

    def rows(self, name: str, ids: npt.ArrayLike) -> FloatArray:
        """Reads rows `ids` [n] of a matrix, [n, columns] float32, without consuming it."""
        return self._file_of[name].load_rows(name, np.asarray(ids, np.int64))

    def finish(self) -> None:
        """Raises CheckpointError when a tensor was never taken."""
        if self._remaining:
            first = next(iter(self._remaining))
            raise CheckpointError(
                f"{len(self._remaining)} tensors of {self.directory} were never used, the first is {first}"
            )

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _check_dummy_heads(self, attention: str) -> None:
        """Raises CheckpointError unless dummy heads add nothing: their columns of `proj` are 0, or their values."""
        projection, qkv = f"{attention}.proj.weight", f"{attention}.qkv.weight"
        width = self.config.vision.hidden_size
        padded = width + self._padding
        values = self.rows(qkv, np.arange(2 * padded + width, 3 * padded))
        columns = self._file_of[projection].load(projection)[:, width:]
        silent = not values.any() and not self.config.vision.qkv_bias
        if columns.any() and not silent:
            raise CheckpointError(
                f"{attention} of {self.directory} has {self._padding // self.config.vision.head_dim} heads beyond "
                f"config.json's {self.config.vision.num_heads}, and they are not zero; correct num_attention_heads"
            )

    def _check_tied_copy(self) -> None:
        """Raises CheckpointError unless lm_head equals the embeddings."""
        table, copy = (LazyWeight(name, self._layout[EMBEDDING], self._file_of[name]) for name in (EMBEDDING, LM_HEAD))
        for start in range(0, table.shape[0], _TIED_ROWS):
            stop = min(start + _TIED_ROWS, table.shape[0])
            differing = (table.rows(start, stop) != copy.rows(start, stop)).any(axis=1)
            if differing.any():
                raise CheckpointError(
                    f"{copy.file.path}: {LM_HEAD} differs from {EMBEDDING} in row {start + int(differing.argmax())}, "
                    "but config.json says tie_word_embeddings; set it to false, or remove the tensor"
                )

    def _check_tensors(self, accounting: Accounting) -> None:
        """Raises CheckpointError for a tensor that is missing, not expected or misshapen."""
        if missing := accounting.missing:
            raise CheckpointError(
                f"{self.directory} has no tensor {missing[0]}{_others(missing)}, which its config.json asks for; "
                "restore the missing shard or correct config.json"
            )
        if unexpected := accounting.unexpected:
            raise CheckpointError(
                f"{self.directory} has the tensor {unexpected[0]}{_others(unexpected)}, which a model of its "
                "config.json does not use; correct config.json or remove the tensor"
            )
        for tensor in accounting.misshapen:
            raise CheckpointError(
                f"tensor {tensor.name} in {self._file_of[tensor.name].path} has shape {list(tensor.stored)}, "
                f"config.json asks for {list(tensor.wanted)}; correct config.json or write the checkpoint again"
            )


def _others(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _locate(directory: Path, files: Sequence[SafetensorsFile]) -> dict[str, SafetensorsFile]:
    """Maps each tensor's name to the one file that holds it."""
    located: dict[str, SafetensorsFile] = {}
    for file in files:
        for name in file.records:
            if name in located:
                raise CheckpointError(
                    f"tensor {name} is in both {located[name].path.name} and {file.path.name} of {directory}; "
                    "write the checkpoint again"
                )
            located[name] = file
    return located


def _samples(file: SafetensorsFile, record: TensorRecord) -> list[bytearray]:
    """Reads evenly spaced blocks of a tensor's data, from its first bytes to its last; all of a small tensor."""
    if record.nbytes <= _SAMPLES * _SAMPLE_BYTES:
        return list(file.blocks(record))
    last = record.nbytes - _SAMPLE_BYTES
    return [file.read_bytes(record, last * i // (_SAMPLES - 1), _SAMPLE_BYTES) for i in range(_SAMPLES)]
