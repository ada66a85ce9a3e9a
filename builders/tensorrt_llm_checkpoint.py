"""Writes an NVLM checkpoint's LLM as a checkpoint of TensorRT-LLM: config.json and one rank{r}.safetensors per GPU.

The vision encoder, the projector and the tag embeddings are not the LLM's: builders/tensorrt_llm/components.py.
"""

from __future__ import annotations

import json
from pathlib import Path

from nvlm_trt.builders.journal import Journal
from nvlm_trt.builders.tensorrt_llm.check import check_llm_checkpoint
from nvlm_trt.builders.tensorrt_llm.layout import CONFIG_FILE, checkpoint_config, rank_layout
from nvlm_trt.builders.tensorrt_llm.mapping import Mapping
from nvlm_trt.builders.tensorrt_llm.quantization import LlmQuantization, llm_quantization
from nvlm_trt.builders.tensorrt_llm.rank_files import RankFiles
from nvlm_trt.builders.tensorrt_llm.shards import stage_tensors
from nvlm_trt.builders.tensorrt_llm.stage_writer import StageWriter
from nvlm_trt.builders.tensorrt_llm.tensor_file import nbytes
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.progress import Bytes, Progress
from nvlm_trt.staging import storage_errors

__all__ = ["LlmQuantization", "Mapping", "check_llm_checkpoint", "llm_quantization", "write_llm_checkpoint"]

_FORMAT = 1  # of what the writer makes: a later writer does not go on with the files of an earlier one


def write_llm_checkpoint(
    checkpoint: Path,
    config: NvlmConfig,
    directory: Path,
    quantization: LlmQuantization,
    mapping: Mapping,
    max_encoder_len: int,
    progress: Progress,
    *,
    dtype: str = "bf16",
    lora: Path | None = None,
) -> None:
    """Write the checkpoint that trtllm-build reads into `directory`, which need not exist.

    `config` is that of the checkpoint. `dtype`: bf16 or fp16. `max_encoder_len`: the most cross-attended tokens of a
    request (X, H). `lora`: an adapter that is merged into the weights.
    Memory does not grow with the model: every tensor of `checkpoint` is read once, some rows at a time, and written to
    all ranks that need it. An interrupted call leaves a journal, with which the next call goes on if it is about the
    same weights, scales and split; otherwise that call starts anew. A finished directory has no journal.
    Raises EngineError for a split that does not fit, for values beyond `dtype`, for a calibration that lacks a layer
    and for a full disk; CheckpointError for the checkpoint."""
    settings = checkpoint_config(config, mapping, quantization, max_encoder_len, dtype)
    layouts = [rank_layout(config, mapping, quantization, rank, dtype) for rank in range(mapping.world_size)]
    with Checkpoint.open(checkpoint, lora) as source, storage_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        what = {
            "format": _FORMAT,
            "checkpoint": source.digest,
            "scales": quantization.fingerprint(),
            "config": settings,
        }
        journal = Journal(directory, what)
        total = Bytes(sum(nbytes(spec) for layout in layouts for spec in layout.values()))
        with RankFiles(directory, layouts, journal) as ranks:
            written = 0

            def report(count: int) -> None:
                nonlocal written
                written += count
                progress("writing the ranks", written, total)

            writer = StageWriter(source, quantization, report)
            for stage in range(mapping.pp):
                files = ranks.files[mapping.rank(stage, 0) : mapping.rank(stage + 1, 0)]
                for tensor in stage_tensors(config, mapping, quantization, stage):
                    name = f"stage {stage} {tensor.name}"
                    before = written
                    if name in journal.done:
                        report(writer.size(tensor, files))
                        continue
                    writer.write(tensor, files)
                    ranks.finished(name, written - before)
            ranks.sync()
        progress("writing the ranks", total, total)
        text = json.dumps(settings, indent=2, allow_nan=False) + "\n"
        (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
        journal.remove()
