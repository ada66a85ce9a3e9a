"""The limits of an engine before it is built: the defaults, and which of a user's a model can have."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from nvlm_trt.errors import EngineError
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.prompt.image_tokens import count_image_tokens

_DEFAULT_IMAGES = 4  # of the most tiles each, that one request may cross-attend to


def default_limits(config: NvlmConfig, tag_length: int) -> EngineLimits:
    """8 requests at once, up to 4096 tokens each, and room for four images of the most tiles in cross-attention."""
    _, cross_tokens = count_image_tokens(config, config.tiles_per_image, tag_length)
    return EngineLimits(
        max_slots=8,
        max_seq_len=min(4096, config.llm.max_position_embeddings),
        max_image_tokens=_DEFAULT_IMAGES * cross_tokens,
        max_tiles=config.max_tiles,
    )


def engine_limits(config: NvlmConfig, tag_length: int, overrides: Mapping[str, int]) -> EngineLimits:
    """`default_limits` with the fields of `overrides`. Raises EngineError for what the model cannot do."""
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
