"""Loads our checkpoints into transformers: its own Qwen2 or Llama for the language model, its InternVL for NVLM-D."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.model.config import LlmConfig, NvlmConfig
from nvlm_trt.reference.vision import projector

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LLM = "language_model."
_VISION = "vision_model."
_LAYER_NAMES = {
    "attn.proj": "attention.projection_layer",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
}
_EMBEDDING_NAMES = {
    "class_embedding": "cls_token",
    "position_embedding": "position_embeddings",
    "patch_embedding": "patch_embeddings.projection",
}


def language_model(checkpoint: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    weights = _read(checkpoint, dtype)
    config = _config(checkpoint)
    kind = Qwen2ForCausalLM if config.llm.family == "qwen2" else LlamaForCausalLM
    with _made_in(dtype):
        model = kind(llm_config(config.llm))
    _load(model, {name.removeprefix(_LLM): tensor for name, tensor in weights.items() if name.startswith(_LLM)})
    return model


def whole_model(checkpoint: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Loads NVLM-D with a projector module of ours: InternVL's projector has biases and no width of its own."""
    weights, config = _read(checkpoint, dtype), _config(checkpoint)
    vision = config.vision
    assert config.image_token_id is not None, "a checkpoint's config names its image placeholder"
    assert config.pixel_shuffle == "v2", "the order in which InternVL lists merged tokens"
    theirs = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=vision.hidden_size,
            num_hidden_layers=vision.num_layers,
            num_attention_heads=vision.num_heads,
            intermediate_size=vision.intermediate_size,
            image_size=[vision.image_size, vision.image_size],
            patch_size=[vision.patch_size, vision.patch_size],
            norm_type=vision.norm_type,
            layer_norm_eps=vision.norm_eps,
            use_qk_norm=vision.qk_norm,
            attention_bias=vision.qkv_bias,
        ),
        text_config=llm_config(config.llm),
        image_token_id=config.image_token_id,
        image_seq_length=config.tokens_per_tile,
        tie_word_embeddings=config.llm.tie_word_embeddings,
    )
    with _made_in(dtype):
        model = InternVLForConditionalGeneration(theirs)
        model.model.multi_modal_projector = projector(config)
    state: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.startswith(_VISION):
            state |= _vision_state(name.removeprefix(_VISION), tensor)
        elif name.startswith(f"{_LLM}model."):
            state[f"model.language_model.{name.removeprefix(f'{_LLM}model.')}"] = tensor
        elif name.startswith(_LLM):
            state[name.removeprefix(_LLM)] = tensor
        else:
            state[name.replace("mlp1.", "model.multi_modal_projector.")] = tensor
    _load(model, state)
    return model


def write_vision_encoder(checkpoint: Path, path: Path) -> None:
    """Writes vision encoder and projector of NVLM-D as TorchScript: tiles [n, 3, E, E] -> [n, T, hidden], float32."""
    model = whole_model(checkpoint)
    model.set_attn_implementation("sdpa")
    edge = _config(checkpoint).vision.image_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # only the number of tiles varies
        traced = torch.jit.trace(_VisionEncoder(model), torch.zeros(2, 3, edge, edge), check_trace=False)
    temporary = path.with_name(f"{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    traced.save(temporary)
    temporary.rename(path)


class _VisionEncoder(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.model
        self.model.language_model = nn.Identity()  # not to be written with it

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        found = self.model.get_image_features(
            pixel_values, vision_feature_layer=-1, vision_feature_select_strategy="default"
        )
        features: Tensor = found.pooler_output
        return features


def llm_config(llm: LlmConfig) -> Any:
    kind = Qwen2Config if llm.family == "qwen2" else LlamaConfig
    return kind(
        vocab_size=llm.vocab_size,
        hidden_size=llm.hidden_size,
        intermediate_size=llm.intermediate_size,
        num_hidden_layers=llm.num_layers,
        num_attention_heads=llm.num_heads,
        num_key_value_heads=llm.num_kv_heads,
        rms_norm_eps=llm.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": llm.rope_theta},
        max_position_embeddings=llm.max_position_embeddings,
        tie_word_embeddings=llm.tie_word_embeddings,
    )


def _config(checkpoint: Path) -> NvlmConfig:
    with Checkpoint.open(checkpoint) as source:
        return source.config


def _read(checkpoint: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    with Checkpoint.open(checkpoint) as source:
        return {name: torch.from_numpy(source.take(name).load()).to(dtype) for name in source.names}


@contextlib.contextmanager
def _made_in(dtype: torch.dtype) -> Iterator[None]:
    """Makes parameters only in `dtype`, as transformers does: `to(dtype)` would also round the rotary frequencies."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _load(model: nn.Module, state: dict[str, Tensor]) -> None:
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    # InternVL's vision tower has a mask token that is never read
    unread = {"lm_head.weight", "model.vision_tower.embeddings.mask_token"}
    assert not unexpected, unexpected
    assert set(missing) <= unread, missing
    model.tie_weights()  # type: ignore[operator]
    model.eval().requires_grad_(False)


def _vision_state(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Renames a tensor of vision_model for InternVLVisionModel, which has q, k and v apart."""
    prefix = "model.vision_tower."
    if name.startswith("embeddings."):
        stem, dot, rest = name.removeprefix("embeddings.").partition(".")
        return {f"{prefix}embeddings.{_EMBEDDING_NAMES[stem]}{dot}{rest}": tensor}
    layer, rest = name.removeprefix("encoder.layers.").split(".", 1)
    prefix += f"encoder.layer.{layer}."
    if rest.startswith("attn.qkv."):
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{prefix}attention.{part}_proj.{rest.removeprefix('attn.qkv.')}": value for part, value in parts}
    for ours, theirs in _LAYER_NAMES.items():
        if rest == ours or rest.startswith(f"{ours}."):
            return {prefix + theirs + rest.removeprefix(ours): tensor}
    return {prefix + rest: tensor}
