"""The models that can be made by name: NVLM-D, -X and -H in four sizes."""

from __future__ import annotations

from dataclasses import dataclass

from nvlm_trt.errors import ConfigError
from nvlm_trt.model.config import ARCHITECTURES, CrossAttentionConfig, LlmConfig, NvlmConfig, VisionConfig
from nvlm_trt.model.preset_names import PRESET_NAMES


@dataclass(frozen=True)
class _Size:
    vision: VisionConfig
    llm: LlmConfig
    interval: int  # of the gated cross-attention blocks of X and H


_INTERNVIT_6B = VisionConfig(hidden_size=3200, num_layers=45, num_heads=25, intermediate_size=12800)

# fmt: off
_SIZES = {
    # tests: a byte-level vocabulary, 56 px tiles of 16 image tokens
    "tiny": _Size(
        VisionConfig(hidden_size=128, num_layers=4, num_heads=4, intermediate_size=512, image_size=56, patch_size=7),
        LlmConfig(family="qwen2", hidden_size=192, num_layers=6, num_heads=6, num_kv_heads=2, intermediate_size=512,
                  vocab_size=512, rope_theta=10_000.0, max_position_embeddings=4096), interval=2),
    # benchmarks: InternViT-300M's size over Qwen2-0.5B's shape
    "small": _Size(
        VisionConfig(hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096),
        LlmConfig(family="qwen2", hidden_size=896, num_layers=24, num_heads=14, num_kv_heads=2, intermediate_size=4864,
                  vocab_size=151936, rope_theta=1e6, tie_word_embeddings=True), interval=4),
    # the paper's ablations: Nous-Hermes-2-Yi-34B
    "34b": _Size(
        _INTERNVIT_6B,
        LlmConfig(family="llama", hidden_size=7168, num_layers=60, num_heads=56, num_kv_heads=8,
                  intermediate_size=20480, vocab_size=64000, rope_theta=5e6, norm_eps=1e-5,
                  max_position_embeddings=4096), interval=6),
    # the paper's models: Qwen2-72B-Instruct
    "72b": _Size(
        _INTERNVIT_6B,
        LlmConfig(family="qwen2", hidden_size=8192, num_layers=80, num_heads=64, num_kv_heads=8,
                  intermediate_size=29568, vocab_size=152064, rope_theta=1e6), interval=8),
}
# fmt: on


def _preset(name: str) -> NvlmConfig:
    _, letter, size_name = name.split("-")
    size = _SIZES[size_name]
    architecture = ARCHITECTURES["dxh".index(letter)]
    return NvlmConfig(
        name=name,
        architecture=architecture,
        vision=size.vision,
        llm=size.llm,
        cross_attention=None if architecture == "D" else CrossAttentionConfig(interval=size.interval),
    )


PRESETS: dict[str, NvlmConfig] = {name: _preset(name) for name in PRESET_NAMES}


def find_preset(name: str) -> NvlmConfig:
    """Raises ConfigError for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is not one of {', '.join(PRESETS)}; name one of them")
    return PRESETS[name]
