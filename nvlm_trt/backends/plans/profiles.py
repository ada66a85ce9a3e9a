"""Computes the optimisation profiles of plans: the shapes that TensorRT accepts, and the shapes that it tunes for."""

from __future__ import annotations

from collections.abc import Sequence

from nvlm_trt.backends.plans import PREFILL_CHUNK
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.plugins.gated_cross_attention import cache_length
from nvlm_trt.prompt.image_tokens import split_tiles

# input -> [smallest, usual, largest] shape
Profile = dict[str, list[list[int]]]


def profiles_of(
    config: NvlmConfig, limits: EngineLimits, prefill_chunk: int = PREFILL_CHUNK
) -> dict[str, list[Profile]]:
    """Return stage -> its profiles. The decoder has two: a chunk of one slot's prompt, and one token of every slot.

    TensorRT tunes the first profile for `prefill_chunk` tokens: every chunk of a prompt except the last has so many."""
    vision, tiles = config.vision, config.tiles_per_image
    tokens = (config.tokens_per_tile, config.llm.hidden_size)
    chunk = min(limits.max_seq_len, prefill_chunk)
    profiles = {
        "vision_encoder": [{"pixel_values": _range((1, tiles), (3, vision.image_size, vision.image_size))}],
        "decoder": [
            _decoder(config, limits, (1, 1, 1), (1, chunk, chunk)),
            _decoder(config, limits, (1, limits.max_slots, limits.max_slots), (1, 1, 1)),
        ],
    }
    if config.cross_layers:
        _, in_cross = split_tiles(config.architecture, tiles)
        most = max(len(range(tiles)[in_cross]), 1)  # NVLM-H cross-attends neither a thumbnail nor a single tile
        profiles["cross_kv"] = [{"image_tokens": _range((1, most), tokens)}]
    return profiles


def _range(tiles: tuple[int, int], rest: Sequence[int]) -> list[list[int]]:
    """Return the shapes of an input of `tiles` (fewest, most), tuned for the most."""
    fewest, most = tiles
    return [[count, *rest] for count in (fewest, most, most)]


def _decoder(config: NvlmConfig, limits: EngineLimits, batches: Sequence[int], tokens: Sequence[int]) -> Profile:
    """Return a decoder profile for `batches` and `tokens` (smallest, usual, largest). The caches' lengths are fixed."""
    llm = config.llm
    cross_tokens = cache_length(limits.max_image_tokens)
    profile: Profile = {
        "input_ids": [[b, s] for b, s in zip(batches, tokens, strict=True)],
        "image_tokens": [[s, llm.hidden_size] for s in tokens],
        "write_indices": [[b] for b in batches],
        "logit_index": [[b] for b in batches],
    }
    for i in range(llm.num_layers):
        for kind in ("key", "value"):
            profile[f"past_{kind}.{i}"] = [[b, llm.num_kv_heads, limits.max_seq_len, llm.head_dim] for b in batches]
    for j in range(len(config.cross_layers)):
        for kind in ("key", "value"):
            profile[f"cross_{kind}.{j}"] = [[b, llm.num_kv_heads, cross_tokens, llm.head_dim] for b in batches]
    if config.cross_layers:
        profile["cross_ranges"] = [[b, s, 2] for b, s in zip(batches, tokens, strict=True)]
    return profile
