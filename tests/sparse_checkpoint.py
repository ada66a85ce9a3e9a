"""Writes checkpoints of any size in no time: real headers, index and side files, and data that is a hole in a file."""

from __future__ import annotations

import json
from pathlib import Path

from lab.shaped_checkpoint import write_shards
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.hf_config import config_to_hf
from nvlm_trt.model.layout import checkpoint_layout
from nvlm_trt.prompt.tokenizer import write_byte_tokenizer


def write_sparse_checkpoint(directory: Path, config: NvlmConfig, shards: int) -> None:
    """Spread the layout of `config` over bfloat16 shards of about equal sizes, all zeros, with a byte tokenizer."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_to_hf(config)))
    write_byte_tokenizer(directory, config.max_tiles)
    write_shards(directory, checkpoint_layout(config), shards)
