"""Chooses the limits of an engine before it is built: the defaults, and the user's limits if the model allows them."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from nvlm_trt.errors import EngineError
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.prompt.image_tokens import count_image_tokens

_DEFAULT_IMAGES = 4  # images with the most tiles that one request can cross-attend


def default_limits(config: NvlmConfig, tag_length: int) -> EngineLimits:
    """Allow 8 requests at once, 4096 tokens each, and four images with the most tiles in cross-attention."""
    _, cross_tokens = count_image_tokens(config, config.tiles_per_image, tag_length)
    return EngineLimits(
        max_slots=8,
        max_seq_len=min(4096, config.llm.max_position_embeddings),
        max_image_tokens=_DEFAULT_IMAGES * cross_tokens,
        max_tiles=config.max_tiles,
    )


def engine_limits(config: NvlmConfig, tag_length: int, overrides: Mapping[str, int]) -> EngineLimits:
    """Replace fields of `default_limits` by `overrides`. Raises EngineError for limits that the model cannot have."""
    default = default_limits(config, tag_length)
    try:
        limits = EngineLimits(**{**default.model_dump(), **overrides})
    except ValidationError as error:
        first = error.errors()[0]
        raise EngineError(f"limit {first['loc'][0]}: {first['msg']}; the default is {default}") from None
    if limits.max_seq_len > config.llm.max_position_embeddings:
        raise EngineError(
            f"max_seq_len {limits.max_seq_len} is beyond the model's {config.llm.max_position_embeddings} positions; "
            "choose a smaller --max-seq-len"
        )
    if limits.max_tiles > config.max_tiles:
        raise EngineError(f"max_tiles {limits.max_tiles} is beyond the model's {config.max_tiles}; choose fewer")
    if config.cross_layers and not limits.max_image_tokens:
        raise EngineError(f"NVLM-{config.architecture} needs max_image_tokens; choose --max-image-tokens above 0")
    return limits
