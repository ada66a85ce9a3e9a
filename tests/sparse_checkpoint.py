"""Writes checkpoints of any size in no time: real headers, index and side files, and data that is a hole in a file."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np

from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.hf_config import config_to_hf
from nvlm_trt.model.layout import checkpoint_layout
from nvlm_trt.prompt.tokenizer import write_byte_tokenizer

Shapes = dict[str, tuple[int, ...]]


def write_sparse_checkpoint(directory: Path, config: NvlmConfig, shards: int) -> None:
    """Spread the layout of `config` over bfloat16 shards of about equal sizes, all zeros."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_to_hf(config)))
    write_byte_tokenizer(directory, config.max_tiles)
    layout = checkpoint_layout(config)
    total = sum(map(_nbytes, layout.values()))
    parts: list[Shapes] = [{} for _ in range(shards)]
    done = 0
    for name, shape in layout.items():
        parts[min(done * shards // total, shards - 1)][name] = shape
        done += _nbytes(shape)
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        _write_shard(directory / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_shard(path: Path, shapes: Shapes) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + _nbytes(shape)]}
        end += _nbytes(shape)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)


def _nbytes(shape: tuple[int, ...]) -> int:
    return 2 * int(np.prod(shape, dtype=np.int64))
