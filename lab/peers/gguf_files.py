"""Writes the GGUF files that llama.cpp reads: a language model, and an InternVL vision encoder with its projector.

Matrices have the type that is asked for, everything else is float32, as llama.cpp's own converter does it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors import safe_open

from lab.peers.internvl import MESSAGE_END, Vocabulary

FILE_TYPES = {Type.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0, Type.BF16: gguf.LlamaFileType.MOSTLY_BF16}
# Parts of the names in NVLM's checkpoints, which are those of InternVL's, and llama.cpp's names for them.
_VISION_NAMES = {
    "vision_model.embeddings.class_embedding": "v.class_embd",
    "vision_model.embeddings.patch_embedding": "v.patch_embd",
    "vision_model.embeddings.position_embedding": "v.position_embd.weight",
    "vision_model.encoder.layers.": "v.blk.",
    ".attn.qkv.": ".attn_{part}.",
    ".attn.proj.": ".attn_out.",
    ".attn.q_norm.": ".attn_q_norm.",
    ".attn.k_norm.": ".attn_k_norm.",
    ".norm1.": ".ln1.",
    ".norm2.": ".ln2.",
    ".mlp.fc1.": ".ffn_up.",
    ".mlp.fc2.": ".ffn_down.",
    "mlp1.": "mm.model.mlp.",
}
_FLOAT32 = ("v.class_embd", "v.patch_embd", "v.position_embd")  # llama.cpp adds or convolves them, no product


def write_language_model(source: Path, path: Path, kind: Type, vocabulary: Vocabulary | None = None) -> None:
    """Writes a Qwen2 in HF layout, float32 safetensors. Without `vocabulary` the model takes token ids only."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    with _writer(path, "qwen2", kind) as writer:
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_vocab_size(config["vocab_size"])
        _add_tokenizer(writer, vocabulary)
        for name, tensor in _tensors(source):
            renamed = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert renamed, name
            _add(writer, renamed, tensor, kind)


def write_vision_encoder(checkpoint: Path, path: Path, kind: Type) -> None:
    """Writes the vision encoder and the projector of an NVLM-D checkpoint as llama.cpp's mmproj of InternVL.

    llama.cpp's graph has biases in the projector: they are zero. It takes RMSNorm for InternViT-6B's shape only and
    normalises others with LayerNorm, without a bias here: the same work, other values."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    vision = config["vision_config"]
    with _writer(path, "clip", kind) as writer:
        writer.add_type(gguf.GGUFType.MMPROJ)
        writer.add_clip_has_vision_encoder(True)
        writer.add_clip_projector_type(gguf.VisionProjectorType.INTERNVL)
        writer.add_vision_projection_dim(config["llm_config"]["hidden_size"])
        writer.add_vision_image_size(vision["image_size"])
        writer.add_vision_patch_size(vision["patch_size"])
        writer.add_vision_embedding_length(vision["hidden_size"])
        writer.add_vision_feed_forward_length(vision["intermediate_size"])
        writer.add_vision_block_count(vision["num_hidden_layers"])
        writer.add_vision_head_count(vision["num_attention_heads"])
        writer.add_vision_image_mean([0.485, 0.456, 0.406])
        writer.add_vision_image_std([0.229, 0.224, 0.225])
        writer.add_vision_attention_layernorm_eps(vision["layer_norm_eps"])
        writer.add_vision_use_gelu(True)
        writer.add_vision_projector_scale_factor(2)
        writer.add_vision_preproc_min_tiles(1)
        writer.add_vision_preproc_max_tiles(config["max_dynamic_patch"])
        for name, tensor in _tensors(checkpoint, ("vision_model.", "mlp1.")):
            for ours, theirs in _VISION_NAMES.items():
                name = name.replace(ours, theirs)
            if name.endswith((".ls1", ".ls2")):
                name += ".weight"
            parts = {part: name.format(part=part) for part in "qkv"} if "{part}" in name else {"": name}
            for renamed, part in zip(parts.values(), np.split(tensor, len(parts)), strict=True):
                _add(writer, renamed, part, kind)
            if name.startswith("mm.model.mlp.") and tensor.ndim == 2:
                writer.add_tensor(name.replace(".weight", ".bias"), np.zeros(len(tensor), np.float32))


@contextlib.contextmanager
def _writer(path: Path, architecture: str, kind: Type) -> Iterator[Any]:
    """Yields a writer; the file appears when all of it is written."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(temporary, architecture)
    writer.add_file_type(FILE_TYPES[kind])
    yield writer
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, path)


def _add(writer: Any, name: str, tensor: np.ndarray, kind: Type) -> None:
    if tensor.ndim == 1 or name.startswith(_FLOAT32):
        flat = name.startswith(("v.class_embd", "v.position_embd"))
        writer.add_tensor(name, tensor.reshape(-1, tensor.shape[-1]).squeeze() if flat else tensor)
    else:
        writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)


def _add_tokenizer(writer: Any, vocabulary: Vocabulary | None) -> None:
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
        return
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([control if i in vocabulary.control else normal for i in range(len(vocabulary.tokens))])
    writer.add_token_merges([" ".join(vocabulary.merge)])
    writer.add_eos_token_id(vocabulary.tokens.index(MESSAGE_END))
    writer.add_add_bos_token(False)


def _tensors(folder: Path, prefixes: tuple[str, ...] = ("",)) -> Iterator[tuple[str, np.ndarray]]:
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            if name.startswith(prefixes):
                yield name, tensors.get_tensor(name).to(torch.float32).numpy()
