"""Reads checkpoints in HF layout, config.json, tokenizer.json and safetensors shards, a tensor or some rows at a time.

Checks names and shapes against `layout` when a checkpoint is opened. Every tensor has to be taken exactly once: a
loader that silently skips weights builds cleanly and speaks nonsense.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nvlm_trt.checkpoint.accounting import Accounting, account, dummy_channels, has_tied_copy, scale_name
from nvlm_trt.checkpoint.dummy_heads import PROJECTION
from nvlm_trt.checkpoint.file_state import TensorRecord
from nvlm_trt.checkpoint.lazy_weight import LazyWeight
from nvlm_trt.checkpoint.lora import LoraAdapter
from nvlm_trt.checkpoint.safetensors_file import FloatArray, SafetensorsFile
from nvlm_trt.checkpoint.stored_names import layout_name
from nvlm_trt.checkpoint.weight_files import weight_files
from nvlm_trt.closing import ClosedOnExit
from nvlm_trt.errors import CheckpointError
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.hf_config import config_in, config_to_hf, read_raw_config
from nvlm_trt.model.layout import EMBEDDING, LM_HEAD, checkpoint_layout
from nvlm_trt.model.quantised_source import FP8_DTYPE, Fp8Scheme, read_scheme

# The digest hashes checkpoints up to this size whole (seconds), and samples of larger ones.
_FULL_DIGEST_BYTES = 4 << 30
_SAMPLE_BYTES = 4096
_SAMPLES = 64
_TIED_ROWS = 256  # compared at a time


class Checkpoint(ClosedOnExit):
    """An open checkpoint whose names and shapes match its config. A context manager."""

    def __init__(
        self,
        directory: Path,
        config: NvlmConfig,
        files: Sequence[SafetensorsFile],
        scheme: Fp8Scheme | None = None,
        adapter: LoraAdapter | None = None,
    ) -> None:
        self.directory = directory
        self.config = config
        self._files = files
        self._adapter = adapter
        self._layout = checkpoint_layout(config)
        self._file_of = _locate(directory, files)
        self._remaining = dict.fromkeys(self._layout)
        records = {name: file.records[name] for name, file in self._file_of.items()}
        self._padding = dummy_channels(config, records)
        self._has_tied_copy = has_tied_copy(config, records)
        self._check_tensors(account(config, records, scheme))
        self._scheme = scheme
        if adapter is not None:
            adapter.check_base({name: records[name].shape for name in self._layout})

    @classmethod
    def open(cls, directory: Path | str, lora: Path | None = None) -> Checkpoint:
        """Checks every header against config.json; reads no tensor. `lora`: an adapter that is added to the weights.

        Raises ConfigError, or CheckpointError naming a tensor that is missing, not expected or misshapen, a file that
        is missing, truncated or corrupt, or an adapter of another base."""
        directory = Path(directory)
        raw = read_raw_config(directory)
        config, scheme = config_in(directory, raw), read_scheme(raw, directory)
        with contextlib.ExitStack() as opened:
            files = []
            for name in weight_files(directory):
                files.append(SafetensorsFile(directory / name, layout_name))
                opened.callback(files[-1].close)
            adapter = None if lora is None else opened.enter_context(LoraAdapter(lora))
            checkpoint = cls(directory, config, files, scheme, adapter)
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
            if self._is_fp8(name):
                digest.update(self._scales(name).tobytes())
        if self._adapter is not None:
            digest.update(f"\nlora {self._adapter.digest}".encode())
        return digest.hexdigest()

    @property
    def stamp(self) -> tuple[tuple[str, int, int], ...]:
        """Name, size and time of change (ns) of every weight file: another stamp means other weights."""
        paths = [file.path for file in (*self._files, *([self._adapter.file] if self._adapter else []))]
        return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)

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
        return self._lazy(name)

    def rows(self, name: str, ids: npt.ArrayLike) -> FloatArray:
        """Reads rows `ids` [n] of a matrix, [n, columns] float32, without consuming it."""
        return self._lazy(name).pick(np.asarray(ids, np.int64))

    def input_scale(self, linear: str) -> float | None:
        """Reads the scale that an FP8 checkpoint has for the input of a linear layer; None: it has none, or weights
        that an adapter changes, of which the scale knows nothing."""
        name = f"{linear}.input_scale"
        if self._scheme is None or self._adapter is not None or name not in self._file_of:
            return None
        scale = self._file_of[name].load(name).reshape(-1)
        return float(scale[0]) if len(scale) == 1 and scale[0] > 0 else None

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
        if self._adapter is not None:
            self._adapter.close()

    def _lazy(self, name: str) -> LazyWeight:
        return replace(self._as_stored(name), shape=self._layout[name])

    def _as_stored(self, name: str) -> LazyWeight:
        """Returns a tensor with its dummy heads."""
        update = self._adapter.updates.get(name) if self._adapter is not None else None
        if self._adapter is not None and name in self._adapter.replaced:
            file = self._adapter.file
            return LazyWeight(name, file.records[name].shape, file, update=update)
        file = self._file_of[name]
        scales = self._scales(name) if self._is_fp8(name) else None
        return LazyWeight(name, file.records[name].shape, file, scales, update)

    def _is_fp8(self, name: str) -> bool:
        """Whether a tensor has scales. Raises CheckpointError for FP8 without."""
        if self._file_of[name].records[name].dtype != FP8_DTYPE:
            return False
        if self._scheme is None:
            raise CheckpointError(
                f"{self._file_of[name].path}: {name} is stored as {FP8_DTYPE}, but config.json has no "
                "quantization_config that says how; restore it from the checkpoint"
            )
        return True

    def _scales(self, name: str) -> FloatArray:
        """Reads the scales of an FP8 tensor: [rows] or [1]."""
        scale = scale_name(name)
        return self._file_of[scale].load(scale).reshape(-1)

    def _check_dummy_heads(self, attention: str) -> None:
        """Raises CheckpointError unless dummy heads add nothing: their columns of `proj` are 0, or their values."""
        projection, qkv = self._as_stored(f"{attention}.proj.weight"), self._as_stored(f"{attention}.qkv.weight")
        width = self.config.vision.hidden_size
        padded = width + self._padding
        silent = not self.config.vision.qkv_bias and not qkv.rows(2 * padded + width, 3 * padded).any()
        if silent or not projection.load()[:, width:].any():
            return
        if self._adapter is not None and any(self._adapter.changes(weight.name) for weight in (projection, qkv)):
            raise CheckpointError(
                f"adapter {self._adapter.directory} has trained the dummy heads of {attention}, which then add to its "
                "output; an engine has none: train qkv or proj alone, or zero their rows of qkv's lora_B"
            )
        raise CheckpointError(
            f"{attention} of {self.directory} has {self._padding // self.config.vision.head_dim} heads beyond "
            f"config.json's {self.config.vision.num_heads}, and they are not zero; correct num_attention_heads"
        )

    def _check_tied_copy(self) -> None:
        """Raises CheckpointError unless lm_head equals the embeddings."""
        table, copy = (
            LazyWeight(name, self._layout[EMBEDDING], self._file_of[name], self._scales(name) if fp8 else None)
            for name, fp8 in ((name, self._is_fp8(name)) for name in (EMBEDDING, LM_HEAD))
        )
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
