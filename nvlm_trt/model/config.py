"""What an NVLM model is: vision encoder, projector, LLM, cross-attention, tiling; and the presets.

Shapes follow the paper (arXiv 2409.11402, sections 4 and 5). `hf_config` reads and writes config.json.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from nvlm_trt.errors import ConfigError

Architecture = Literal["D", "X", "H"]
LlmFamily = Literal["qwen2", "llama"]

ARCHITECTURES: tuple[Architecture, ...] = ("D", "X", "H")
IMAGE_TOKEN = "<|vision_pad|>"


def _check_types(config: Any, where: str) -> None:
    """Every number positive and finite, every flag a bool, every choice one of its own: JSON may hold anything."""
    _check_choices(config, where)
    for item in fields(config):
        value = getattr(config, item.name)
        if item.type == "bool":
            if not isinstance(value, bool):
                raise ConfigError(f"{where}: {item.name} = {value!r} must be true or false; correct config.json")
        elif item.type in ("int", "float"):
            kinds = (int,) if item.type == "int" else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < float("inf"):
                raise ConfigError(f"{where}: {item.name} = {value!r} must be a positive number; correct config.json")


def _check_choices(config: Any, where: str) -> None:
    """Code that branches on one choice takes every other value, a mistyped one too, for the other choice."""
    for name, hint in get_type_hints(type(config)).items():
        choices = get_args(hint)
        if get_origin(hint) is Literal and getattr(config, name) not in choices:
            raise ConfigError(f"{where}: {name} = {getattr(config, name)!r} is not one of {', '.join(choices)}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class VisionConfig:
    """InternViT: [tiles, 3, image_size, image_size] -> [tiles, patches, hidden_size], class token dropped."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int = 448
    patch_size: int = 14
    norm_type: Literal["rms_norm", "layer_norm"] = "rms_norm"
    norm_eps: float = 1e-6
    qk_norm: bool = True
    qkv_bias: bool = False

    def __post_init__(self) -> None:
        _check_types(self, "vision_config")
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"vision_config: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_heads}; correct config.json"
            )
        if self.image_size % (2 * self.patch_size):
            raise ConfigError(
                f"vision_config: image_size {self.image_size} is not a multiple of twice patch_size "
                f"{self.patch_size}, which pixel shuffle needs; correct config.json"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def grid(self) -> int:
        """Patches along one edge of a tile."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class LlmConfig:
    """A Qwen2 (q/k/v bias) or Llama/Yi (no bias) decoder with grouped-query attention and SwiGLU."""

    family: LlmFamily
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float
    norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    head_dim: int = 0  # 0: hidden_size / num_heads

    def __post_init__(self) -> None:
        derive_head_dim = self.head_dim == 0
        if derive_head_dim:
            object.__setattr__(self, "head_dim", 1)  # passes the check until the numbers it follows from have
        _check_types(self, "llm_config")
        if derive_head_dim:
            if self.hidden_size % self.num_heads:
                raise ConfigError(
                    f"llm_config: hidden_size {self.hidden_size} is not a multiple of "
                    f"num_attention_heads {self.num_heads}; correct config.json"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"llm_config: num_attention_heads {self.num_heads} is not a multiple of "
                f"num_key_value_heads {self.num_kv_heads}; correct config.json"
            )
        if self.head_dim % 2:
            raise ConfigError(f"llm_config: head_dim {self.head_dim} is odd, which rotary embedding cannot use")

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"


@dataclass(frozen=True)
class CrossAttentionConfig:
    """Flamingo's gated blocks: block j stands before decoder layer j * interval."""

    interval: int
    ffn: bool = True  # a tanh-gated FFN after the gated attention, as in Flamingo
    qk_norm: bool = False  # RMSNorm over head_dim on q and k

    def __post_init__(self) -> None:
        _check_types(self, "cross_attention_config")


@dataclass(frozen=True)
class NvlmConfig:
    """One model of the family. `name` is for people; `architecture` decides where image tokens go."""

    name: str
    architecture: Architecture
    vision: VisionConfig
    llm: LlmConfig
    cross_attention: CrossAttentionConfig | None = None
    max_tiles: int = 6
    pixel_shuffle: Literal["v1", "v2"] = "v2"
    image_token_id: int | None = None  # None: looked up in the tokenizer by IMAGE_TOKEN
    projector_hidden_size: int | None = None  # None: the LLM's intermediate_size, as NVLM-D-72B does

    def __post_init__(self) -> None:
        _check_choices(self, self.name)
        if (self.architecture == "D") != (self.cross_attention is None):
            need = "has no" if self.architecture == "D" else "needs a"
            raise ConfigError(f"NVLM-{self.architecture} {need} cross_attention_config; correct config.json")
        if not _is_int(self.max_tiles) or self.max_tiles < 1:
            raise ConfigError(f"max_dynamic_patch {self.max_tiles!r} must be at least 1; correct config.json")
        width = self.projector_hidden_size
        if width is not None and (not _is_int(width) or width < 1):
            raise ConfigError(f"projector_hidden_size {width!r} must be at least 1; correct config.json")
        token = self.image_token_id
        if token is not None and (not _is_int(token) or not 0 <= token < self.llm.vocab_size):
            raise ConfigError(f"image_token_id {token!r} is outside the vocabulary of {self.llm.vocab_size}")

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens that one tile becomes: pixel shuffle 0.5 merges 2 x 2 patches."""
        return (self.vision.grid // 2) ** 2

    @property
    def shuffled_size(self) -> int:
        """Channels after pixel shuffle."""
        return 4 * self.vision.hidden_size

    @property
    def projector_width(self) -> int | None:
        """Hidden width of the two-layer projector; None for NVLM-X's single layer."""
        if self.architecture == "X":
            return None
        return self.projector_hidden_size or self.llm.intermediate_size

    @property
    def cross_layers(self) -> tuple[int, ...]:
        """Decoder layers that a gated cross-attention block stands before, in order."""
        if self.cross_attention is None:
            return ()
        return tuple(range(0, self.llm.num_layers, self.cross_attention.interval))

    @property
    def tiles_per_image(self) -> int:
        """The most tiles that one image can become, thumbnail included."""
        return self.max_tiles + (self.max_tiles > 1)

    def cross_tokens_per_tile(self, tag_length: int) -> int:
        """Cross-attended tokens of one tile; NVLM-H adds its tag's text embeddings. `tag_length`: tokens of a tag."""
        return self.tokens_per_tile + (tag_length if self.architecture == "H" else 0)


# --- presets -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Size:
    vision: VisionConfig
    llm: LlmConfig
    interval: int
    max_tiles: int = 6


_INTERNVIT_6B = VisionConfig(hidden_size=3200, num_layers=45, num_heads=25, intermediate_size=12800)

# fmt: off
_SIZES = {
    # tests: a byte-level vocabulary, 56 px tiles of 16 image tokens
    "tiny": _Size(
        VisionConfig(hidden_size=128, num_layers=4, num_heads=4, intermediate_size=512, image_size=56, patch_size=7),
        LlmConfig("qwen2", hidden_size=192, num_layers=6, num_heads=6, num_kv_heads=2, intermediate_size=512,
                  vocab_size=512, rope_theta=10_000.0, max_position_embeddings=4096), interval=2),
    # benchmarks: InternViT-300M's size over Qwen2-0.5B's shape
    "small": _Size(
        VisionConfig(hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096),
        LlmConfig("qwen2", hidden_size=896, num_layers=24, num_heads=14, num_kv_heads=2, intermediate_size=4864,
                  vocab_size=151936, rope_theta=1e6, tie_word_embeddings=True), interval=4),
    # the paper's ablations: Nous-Hermes-2-Yi-34B
    "34b": _Size(
        _INTERNVIT_6B,
        LlmConfig("llama", hidden_size=7168, num_layers=60, num_heads=56, num_kv_heads=8, intermediate_size=20480,
                  vocab_size=64000, rope_theta=5e6, norm_eps=1e-5, max_position_embeddings=4096), interval=6),
    # the paper's models: Qwen2-72B-Instruct
    "72b": _Size(
        _INTERNVIT_6B,
        LlmConfig("qwen2", hidden_size=8192, num_layers=80, num_heads=64, num_kv_heads=8, intermediate_size=29568,
                  vocab_size=152064, rope_theta=1e6), interval=8),
}
# fmt: on


def _preset(architecture: Architecture, size_name: str) -> NvlmConfig:
    size = _SIZES[size_name]
    return NvlmConfig(
        name=f"nvlm-{architecture.lower()}-{size_name}",
        architecture=architecture,
        vision=size.vision,
        llm=size.llm,
        cross_attention=None if architecture == "D" else CrossAttentionConfig(size.interval),
        max_tiles=size.max_tiles,
    )


PRESETS: dict[str, NvlmConfig] = {
    config.name: config for size in _SIZES for config in (_preset(architecture, size) for architecture in ARCHITECTURES)
}
