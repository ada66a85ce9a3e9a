"""Writes what the engine directory holds beside the LLM: the vision encoder with its projector, and the tag embeddings.

Both keep the names of our checkpoint layout, and are read by the PyTorch that every TensorRT-LLM container has.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from nvlm_trt.builders.graphs.streamed import blocks_of
from nvlm_trt.builders.tensorrt_llm.layout import DTYPES, Layout, TensorSpec
from nvlm_trt.builders.tensorrt_llm.tensor_file import TensorFile, nbytes
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.layout import EMBEDDING, projector_layout, vision_layout
from nvlm_trt.progress import Bytes, Progress
from nvlm_trt.prompt.encoder import PromptEncoder
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.staging import storage_errors

TAG_EMBEDDINGS: Final = "tag_embeddings"


def write_vision_encoder(
    checkpoint: Path, config: NvlmConfig, path: Path, dtype: str, progress: Progress, lora: Path | None = None
) -> None:
    """Write InternViT and the projector, without dummy heads, as one safetensors file of `dtype` (bf16 or fp16).

    Memory holds some rows of one tensor. Raises EngineError for values beyond `dtype` and for a full disk,
    CheckpointError for the checkpoint."""
    shapes = {**vision_layout(config), **projector_layout(config)}
    layout = {name: TensorSpec(shape, DTYPES[dtype]) for name, shape in shapes.items()}
    total, written = Bytes(sum(map(nbytes, layout.values()))), 0
    with Checkpoint.open(checkpoint, lora) as source, storage_errors(path), _published(path, layout) as file:
        for name in layout:
            first = 0
            for block in blocks_of(source.take(name)):
                written += file.write(name, first, block)
                first += block.size
                progress("writing the vision encoder", written, total)


def write_tag_embeddings(
    checkpoint: Path, config: NvlmConfig, path: Path, dtype: str, lora: Path | None = None
) -> None:
    """Write the text embeddings of NVLM-H's tile tags, `tag_embeddings` [max_tiles, tag_length, hidden], which stand
    before the image tokens of their tiles. Raises EngineError for a full disk, CheckpointError for the checkpoint."""
    assert config.architecture == "H", "only NVLM-H cross-attends tile tags"
    tags = PromptEncoder(config, Tokenizer.from_directory(checkpoint)).tag_ids(config.max_tiles)
    layout = {TAG_EMBEDDINGS: TensorSpec((*tags.shape, config.llm.hidden_size), DTYPES[dtype])}
    with Checkpoint.open(checkpoint, lora) as source, storage_errors(path), _published(path, layout) as file:
        file.write(TAG_EMBEDDINGS, 0, source.rows(EMBEDDING, tags.reshape(-1)))


@contextlib.contextmanager
def _published(path: Path, layout: Layout) -> Iterator[TensorFile]:
    """Yield a file under a temporary name, and give the file its name when the block ends without an error."""
    part = path.with_name(f".{path.name}.part")
    try:
        with TensorFile(part, layout, keep=False) as file:
            yield file
            file.sync()
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
