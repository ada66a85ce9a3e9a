"""Splits the tiles of an image, by architecture, between the LLM's sequence and cross-attention."""

from __future__ import annotations

from nvlm_trt.errors import RequestError
from nvlm_trt.model.config import Architecture, NvlmConfig


def split_tiles(architecture: Architecture, tiles: int) -> tuple[slice, slice]:
    """Return which tiles of an image, thumbnail last, join the LLM's sequence, and which are cross-attended."""
    if architecture == "D":
        return slice(0, tiles), slice(0, 0)
    regular = tiles if architecture == "X" else tiles - 1
    return slice(regular, tiles), slice(0, regular)


def count_image_tokens(config: NvlmConfig, tiles: int, tag_length: int) -> tuple[int, int]:
    """Count the tokens that an image of `tiles` tiles adds to the LLM's sequence, and its cross-attended tokens: in
    NVLM-H, tile tags included."""
    in_llm, in_cross = (len(range(tiles)[part]) for part in split_tiles(config.architecture, tiles))
    return in_llm * config.tokens_per_tile, in_cross * config.cross_tokens_per_tile(tag_length)


def check_cross_tiles(config: NvlmConfig, tiles: int) -> None:
    """Check the cross-attended tiles of one image. Raises RequestError."""
    most = len(range(config.tiles_per_image)[split_tiles(config.architecture, config.tiles_per_image)[1]])
    if tiles > most:
        raise RequestError(f"an image of {tiles} cross-attended tiles, the model takes {most}; lower max_tiles")
