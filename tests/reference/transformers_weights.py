"""Makes transformers' models with random weights, and names those weights as a checkpoint does."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import InternVLVisionConfig

from nvlm_trt.model.config import LlmConfig, VisionConfig

TOLERANCE = 1e-4  # float32, largest absolute difference

_VISION_NAMES = {
    "attention.projection_layer": "attn.proj",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_1": "ls1",
    "lambda_2": "ls2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> None:
    """Matrices keep variance; norms, scales, biases and embeddings move far from the 0 or 1 that they start with, so
    that a parameter which is ignored or misplaced shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.copy_(0.3 * noise + (1.0 if name.endswith("weight") else 0.2))
        elif "embed_tokens" in name or "cls_token" in name or "position_embeddings" in name:
            parameter.copy_(noise)
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Asserts that both are finite, not degenerate, and equal within TOLERANCE."""
    assert torch.isfinite(actual).all()
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def internvl_vision_config(config: VisionConfig) -> InternVLVisionConfig:
    return InternVLVisionConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        image_size=[config.image_size, config.image_size],
        patch_size=[config.patch_size, config.patch_size],
        norm_type=config.norm_type,
        layer_norm_eps=config.norm_eps,
        use_qk_norm=config.qk_norm,
        attention_bias=config.qkv_bias,
    )


def internvl_vision_weights(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the state of InternVLVisionModel to vision_model.*, without that prefix."""
    ours: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        if name.startswith("embeddings."):
            name = name.replace("cls_token", "class_embedding").replace("position_embeddings", "position_embedding")
            ours[name.replace("patch_embeddings.projection", "patch_embedding")] = tensor
            continue
        _, _, layer, rest = name.split(".", 3)  # encoder.layer.{i}.
        prefix = f"encoder.layers.{layer}."
        if rest.startswith("attention.q_proj."):
            parts = [theirs[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            ours[f"{prefix}attn.qkv.{rest.rsplit('.', 1)[1]}"] = torch.cat(parts)
        elif not rest.startswith(("attention.k_proj.", "attention.v_proj.")):
            stem = next(stem for stem in _VISION_NAMES if rest == stem or rest.startswith(f"{stem}."))
            ours[prefix + _VISION_NAMES[stem] + rest.removeprefix(stem)] = tensor
    return ours


def llm_arguments(config: LlmConfig) -> dict[str, object]:
    """Makes keyword arguments for Qwen2Config, LlamaConfig and MllamaTextConfig."""
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
