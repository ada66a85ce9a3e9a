"""What every backend refuses before it computes: requests that do not fit the model or the engine."""

from __future__ import annotations

from nvlm_trt.engine import EngineLimits
from nvlm_trt.errors import RequestError
from nvlm_trt.model.config import NvlmConfig


def check_tiles(config: NvlmConfig, tiles: int) -> None:
    """One image's cross-attended tiles. Raises RequestError."""
    if tiles > config.tiles_per_image:
        raise RequestError(f"an image of {tiles} tiles, the model takes {config.tiles_per_image}; lower max_tiles")


def check_cross_tokens(limits: EngineLimits, tokens: int) -> None:
    """All cross-attended tokens of one request. Raises RequestError."""
    if tokens > limits.max_image_tokens:
        raise RequestError(
            f"the images need {tokens} cross-attended tokens, this engine holds {limits.max_image_tokens} per "
            "request; send fewer images or tiles, or rebuild with a larger --max-image-tokens"
        )


def check_step(limits: EngineLimits, places: int, image_tokens: int, length: int) -> None:
    """Image tokens that `places` in the prompt are for, and the longest sequence after a step. Raises RequestError."""
    if places != image_tokens:
        raise RequestError(
            f"{places} image tokens in the prompt, {image_tokens} were given; encode the prompt with the images that "
            "it is sent with"
        )
    if length > limits.max_seq_len:
        raise RequestError(
            f"the sequence would have {length} tokens, this engine holds {limits.max_seq_len}; shorten the prompt, or "
            "rebuild with a larger --max-seq-len"
        )
