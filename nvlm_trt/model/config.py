"""The parts and sizes of an NVLM model: vision encoder, projector, LLM, cross-attention and tiling.

Shapes follow the paper (arXiv 2409.11402, sections 4 and 5). `hf_config` reads and writes config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, WrapValidator
from pydantic.dataclasses import dataclass

from nvlm_trt.bounds import MAX_TILES, MAX_TOKENS
from nvlm_trt.errors import ConfigError
from nvlm_trt.validation import STRICT, CheckedFields

Architecture = Literal["D", "X", "H"]
LlmFamily = Literal["qwen2", "llama"]

ARCHITECTURES: tuple[Architecture, ...] = ("D", "X", "H")
IMAGE_TOKEN = "<|vision_pad|>"


def _as_given(value: float, validate: Callable[[float], float]) -> float:
    """Validates a float and keeps an int an int: a checkpoint's digest tells 10000 from 10000.0."""
    validate(value)
    return value


# Bounds, far above every known model, keep a corrupt config.json from taking all memory before anything is checked.
_Width = Annotated[int, Field(gt=0, le=1 << 20)]
_Layers = Annotated[int, Field(gt=0, le=1 << 10)]
_Heads = Annotated[int, Field(gt=0, le=1 << 12)]
_Pixels = Annotated[int, Field(gt=0, le=1 << 12)]
_VocabSize = Annotated[int, Field(gt=0, le=1 << 24)]
_MAX_PATCHES = 256  # along an edge of a tile
_Epsilon = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), WrapValidator(_as_given)]
_RopeTheta = Annotated[float, Field(gt=0, le=1e15, allow_inf_nan=False), WrapValidator(_as_given)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VisionConfig(CheckedFields):
    """InternViT: [tiles, 3, image_size, image_size] -> [tiles, patches, hidden_size], class token dropped."""

    PREFIX: ClassVar[str] = "vision_config."
    KEYS: ClassVar[Mapping[str, str]] = {
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "norm_eps": "layer_norm_eps",
        "qk_norm": "qk_normalization",
    }

    hidden_size: _Width
    num_layers: _Layers
    num_heads: _Heads
    intermediate_size: _Width
    image_size: _Pixels = 448
    patch_size: _Pixels = 14
    norm_type: Literal["rms_norm", "layer_norm"] = "rms_norm"
    norm_eps: _Epsilon = 1e-6
    qk_norm: bool = True
    qkv_bias: bool = False

    def __post_init__(self) -> None:
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

        if self.grid > _MAX_PATCHES:
            raise ConfigError(
                f"vision_config: image_size {self.image_size} has {self.grid} patches of patch_size {self.patch_size} "
                f"along an edge, at most {_MAX_PATCHES} are supported; correct config.json"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def grid(self) -> int:
        """Patches along one edge of a tile."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LlmConfig(CheckedFields):
    """A Qwen2 (q/k/v bias) or Llama/Yi (no bias) decoder with grouped-query attention and SwiGLU."""

    PREFIX: ClassVar[str] = "llm_config."
    KEYS: ClassVar[Mapping[str, str]] = {
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "norm_eps": "rms_norm_eps",
    }

    family: LlmFamily
    hidden_size: _Width
    num_layers: _Layers
    num_heads: _Heads
    num_kv_heads: _Heads
    intermediate_size: _Width
    vocab_size: _VocabSize
    rope_theta: _RopeTheta
    norm_eps: _Epsilon = 1e-6
    max_position_embeddings: Annotated[int, Field(gt=0, le=MAX_TOKENS)] = 32768
    tie_word_embeddings: bool = False
    head_dim: Annotated[int, Field(ge=0, le=1 << 14)] = 0  # 0: hidden_size / num_heads

    def __post_init__(self) -> None:
        if self.head_dim == 0:
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
            raise ConfigError(
                f"llm_config: head_dim {self.head_dim} is odd, which rotary embedding cannot use; correct config.json"
            )

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CrossAttentionConfig(CheckedFields):
    """Flamingo's gated blocks: block j stands before decoder layer j * interval."""

    PREFIX: ClassVar[str] = "cross_attention_config."

    interval: _Layers
    ffn: bool = True  # a tanh-gated FFN after the gated attention, as in Flamingo
    qk_norm: bool = False  # RMSNorm over head_dim on q and k


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NvlmConfig(CheckedFields):
    """One model of the family. `name` is for people; `architecture` decides where image tokens go."""

    KEYS: ClassVar[Mapping[str, str]] = {"max_tiles": "max_dynamic_patch", "pixel_shuffle": "ps_version"}

    name: str
    architecture: Architecture
    vision: VisionConfig
    llm: LlmConfig
    cross_attention: CrossAttentionConfig | None = None
    max_tiles: Annotated[int, Field(gt=0, le=MAX_TILES)] = 6
    pixel_shuffle: Literal["v1", "v2"] = "v2"
    image_token_id: NonNegativeInt | None = None  # None: looked up in the tokenizer by IMAGE_TOKEN
    projector_hidden_size: _Width | None = None  # None: the LLM's intermediate_size, as NVLM-D-72B does

    def __post_init__(self) -> None:
        if (self.architecture == "D") != (self.cross_attention is None):
            need = "has no" if self.architecture == "D" else "needs a"
            raise ConfigError(f"NVLM-{self.architecture} {need} cross_attention_config; correct config.json")
        if self.image_token_id is not None and self.image_token_id >= self.llm.vocab_size:
            raise ConfigError(
                f"image_token_id {self.image_token_id} is outside the vocabulary of {self.llm.vocab_size}; "
                "correct config.json"
            )

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
