"""Writes checkpoints in HF layout: bfloat16 safetensors shards, one tensor in memory at a time.

File sizes and offsets follow from the layout, so a header is written before its data and tensors may come in any
order. The directory gets its name when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt

from nvlm_trt.checkpoint.weight_files import INDEX_FILE, WEIGHTS_FILE
from nvlm_trt.errors import CheckpointError
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.hf_config import config_to_hf
from nvlm_trt.model.layout import Shapes, checkpoint_layout
from nvlm_trt.progress import Progress
from nvlm_trt.staging import is_replaceable, published_directory

SHARD_BYTES = 4 << 30

_ITEM_BYTES = 2  # bfloat16


@dataclass
class _Shard:
    """A file to write. `begins`: the first byte of each tensor, from the end of the header."""

    begins: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0


def write_checkpoint(
    directory: Path | str,
    config: NvlmConfig,
    tensors: Iterable[tuple[str, npt.NDArray[np.generic]]],
    *,
    files: Iterable[Path] = (),
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes config.json and every tensor of `config`'s layout, rounded to bfloat16; copies `files` beside them.

    Raises CheckpointError when the tensors are not those of the layout or when `directory` exists (with `overwrite`:
    when it is not a checkpoint), EngineError when the disk is full. Leaves nothing half-written behind."""
    directory = Path(directory).absolute()
    with published_directory(directory, lambda: _check_target(directory, overwrite), overwrite) as staging:
        text = json.dumps(config_to_hf(config), indent=2, allow_nan=False)
        (staging / "config.json").write_text(text + "\n", encoding="utf-8")
        for path in files:
            shutil.copyfile(path, staging / path.name)
        _write_tensors(staging, checkpoint_layout(config), tensors, shard_bytes, progress)


def _check_target(directory: Path, overwrite: bool) -> None:
    if not os.path.lexists(directory):
        return
    if not overwrite:
        raise CheckpointError(f"{directory} exists; choose another directory or pass --overwrite")
    if not is_replaceable(directory, "config.json"):
        raise CheckpointError(f"{directory} is not a checkpoint, so it is not overwritten; choose another directory")


def _write_tensors(
    directory: Path,
    layout: Shapes,
    tensors: Iterable[tuple[str, npt.NDArray[np.generic]]],
    shard_bytes: int,
    progress: Progress | None,
) -> None:
    paths = _create_files(directory, layout, shard_bytes)
    total = sum(_nbytes(shape) for shape in layout.values())
    written: set[str] = set()
    done = 0
    for name, tensor in tensors:
        if name not in layout or name in written:
            raise CheckpointError(f"tensor {name} {'comes twice' if name in layout else 'is not in the layout'}")
        if tensor.shape != layout[name]:
            raise CheckpointError(f"tensor {name} has shape {list(tensor.shape)}, not {list(layout[name])}")
        path, offset = paths[name]
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(np.ascontiguousarray(tensor, ml_dtypes.bfloat16).view(np.uint8).data)
        written.add(name)
        done += _nbytes(tensor.shape)
        if progress is not None:
            progress("writing weights", done, total)
    if len(written) < len(layout):
        missing = next(name for name in layout if name not in written)
        raise CheckpointError(f"tensor {missing} was not given; a checkpoint needs every tensor of its layout")


def _create_files(directory: Path, layout: Shapes, shard_bytes: int) -> dict[str, tuple[Path, int]]:
    """Writes the headers, and the index when there are several files. Returns each tensor's file and offset in it."""
    shards = _plan_shards(layout, shard_bytes)
    places: dict[str, tuple[Path, int]] = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        header = _header(shard, layout)
        (directory / name).write_bytes(header)
        places |= {tensor: (directory / name, len(header) + begin) for tensor, begin in shard.begins.items()}
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
            "weight_map": {tensor: path.name for tensor, (path, _) in places.items()},
        }
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return places


def _plan_shards(layout: Shapes, shard_bytes: int) -> list[_Shard]:
    """Fills files up to `shard_bytes` in layout order; a larger tensor gets its own file."""
    shards = [_Shard()]
    for name, shape in layout.items():
        if shards[-1].begins and shards[-1].nbytes + _nbytes(shape) > shard_bytes:
            shards.append(_Shard())
        shards[-1].begins[name] = shards[-1].nbytes
        shards[-1].nbytes += _nbytes(shape)
    return shards


def _header(shard: _Shard, layout: Shapes) -> bytes:
    """Makes a header: length (8 bytes) and JSON, padded with spaces so that data begins at a multiple of 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    for name, begin in shard.begins.items():
        entries[name] = {
            "dtype": "BF16",
            "shape": layout[name],
            "data_offsets": [begin, begin + _nbytes(layout[name])],
        }
    text = json.dumps(entries, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _nbytes(shape: tuple[int, ...]) -> int:
    return _ITEM_BYTES * int(np.prod(shape, dtype=np.int64))
