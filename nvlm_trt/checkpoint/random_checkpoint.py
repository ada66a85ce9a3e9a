"""Writes random checkpoints: tests and benchmarks need weights, and of the presets only NVLM-D-72B was published.

Scales keep activations near 1 through all layers and make every part count: logits depend on the text, on the image
and on the gates, so that an error in any of them shows.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from nvlm_trt.checkpoint.safetensors_file import FloatArray
from nvlm_trt.checkpoint.writer import write_checkpoint
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.layout import checkpoint_layout
from nvlm_trt.model.presets import find_preset
from nvlm_trt.progress import Progress
from nvlm_trt.prompt.tokenizer import Tokenizer, write_byte_tokenizer
from nvlm_trt.temporary import temporary_folder

# Gains of the decoder's layers over the embeddings: enough that the next token depends on the context. The FFN adds
# most: attention averages over the context, so that it adds nearly the same to every token, and decoding repeats.
_ATTENTION_GAIN = 2.0
_FFN_GAIN = 6.0
# Random queries attend to all image tokens about equally, which hides most differences between two images.
_CROSS_QUERY_GAIN = 3.0


def init_checkpoint(
    directory: Path | str, preset: str, seed: int, overwrite: bool = False, progress: Progress | None = None
) -> None:
    """Calls `write_random_checkpoint` for a preset. Raises ConfigError for an unknown one."""
    write_random_checkpoint(directory, find_preset(preset), seed, overwrite, progress)


def write_random_checkpoint(
    directory: Path | str, config: NvlmConfig, seed: int, overwrite: bool = False, progress: Progress | None = None
) -> None:
    """Writes a random checkpoint of `config` in bfloat16, with a byte-level tokenizer and its image placeholder's id.

    The same config and seed give the same files. A tensor follows from its name, shape and seed: D, X and H of one
    size share vision encoder and LLM. Raises what `write_checkpoint` raises."""
    with tempfile.TemporaryDirectory(dir=temporary_folder()) as folder:
        write_byte_tokenizer(Path(folder), config.max_tiles)
        config = replace(config, image_token_id=Tokenizer.from_directory(Path(folder)).image_token_id)
        write_checkpoint(
            directory,
            config,
            _random_tensors(config, seed),
            files=sorted(Path(folder).iterdir()),
            overwrite=overwrite,
            progress=progress,
        )


def _random_tensors(config: NvlmConfig, seed: int) -> Iterator[tuple[str, FloatArray]]:
    for name, shape in checkpoint_layout(config).items():
        key = hashlib.sha256(f"{seed} {name}".encode()).digest()
        yield name, _random_tensor(config, name, shape, np.random.Generator(np.random.SFC64(list(key))))


def _random_tensor(config: NvlmConfig, name: str, shape: tuple[int, ...], random: np.random.Generator) -> FloatArray:
    if name.endswith("_gate"):
        return (random.choice([-1, 1], shape) * random.uniform(0.3, 0.9, shape)).astype(np.float32)
    if name.endswith((".ls1", ".ls2")):
        return random.uniform(0.1, 0.5, shape).astype(np.float32)
    values = random.standard_normal(shape, dtype=np.float32)
    if name == "language_model.model.norm.weight" and config.llm.tie_word_embeddings:
        # around 0: else a tied lm_head scores the input token highest and repeats it for ever
        return values / math.sqrt(config.llm.hidden_size)
    values *= _std(config, name, shape)
    if len(shape) == 1 and name.endswith(".weight"):  # norms
        values += 1
    return values


def _std(config: NvlmConfig, name: str, shape: tuple[int, ...]) -> float:
    """Returns the standard deviation of a tensor's elements."""
    if len(shape) == 1:
        return 0.1 if name.endswith(".weight") else 0.05
    if name.endswith("embed_tokens.weight"):
        return 1.0
    if name.endswith(("class_embedding", "position_embedding")):
        return 0.3
    std = 1 / math.sqrt(math.prod(shape[1:]))  # keeps the variance of a linear layer's input
    if "cross_layers" in name:
        return std * _CROSS_QUERY_GAIN if name.endswith("q_proj.weight") else std
    if name.endswith("o_proj.weight"):
        return std * _ATTENTION_GAIN / math.sqrt(2 * config.llm.num_layers)
    if name.endswith("down_proj.weight"):
        return std * _FFN_GAIN / math.sqrt(2 * config.llm.num_layers)
    return std
