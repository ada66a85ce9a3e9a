"""Computes the least time of a prompt and of a token from FLOPs and from bytes of weights and caches moved."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from nvlm_trt.model.components import part_of
from nvlm_trt.model.layout import checkpoint_layout
from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.planner.memory import is_linear, plan_engine, stage_of_tensor
from nvlm_trt.plugins.gated_cross_attention import cache_length
from nvlm_trt.prompt.image_tokens import count_image_tokens


@dataclass(frozen=True)
class Work:
    """Counts floating-point (or integer) operations, two per multiply-add, and bytes of weights and caches moved."""

    flops: float
    nbytes: float

    def seconds(self, bandwidth: float, flop_rate: float) -> float:
        """Compute the least time at `bandwidth` bytes and `flop_rate` operations per second."""
        return max(self.flops / flop_rate, self.nbytes / bandwidth)


class Roofline:
    """Computes the least cost of requests. Activations count as if they stayed in the processor's own memory."""

    def __init__(self, design: EngineDesign) -> None:
        self._config, self._tag_length, self.chunk_size = design.config, design.tag_length, design.backend.prefill_chunk
        self._size = design.number_size
        config = design.config
        whole = design.backend.memory.whole_cross_cache and config.cross_layers
        self._cross_capacity = cache_length(design.limits.max_image_tokens) if whole else None
        self._weights = {stage: memory.read for stage, memory in plan_engine(design).stages.items()}
        self._multiplied = dict.fromkeys(("patches", "layers", "projector", "cross_kv", "decoder"), 0)
        for name, shape in checkpoint_layout(config).items():
            if is_linear(name, shape) and part_of(name) != "lm_head":
                self._multiplied[_rows_of(name)] += math.prod(shape)

    def prefill(self, text_tokens: int, tiles: int) -> dict[str, Work]:
        """Return the work of each stage for one request: an image of `tiles` tiles, thumbnail included (0: no image),
        and `text_tokens` that all read the whole image."""
        image_tokens, cross_tokens = count_image_tokens(self._config, tiles, self._tag_length)
        work = {"vision_encoder": self.encode(tiles)} if tiles else {}
        if cross_tokens:
            work["cross_kv"] = self.cross_kv(cross_tokens)
        chunks = [self.chunk(*chunk, cross_tokens) for chunk in self.chunks(text_tokens + image_tokens)]
        work["decoder"] = Work(sum(chunk.flops for chunk in chunks), sum(chunk.nbytes for chunk in chunks))
        return work

    def chunks(self, tokens: int) -> Iterator[tuple[int, int]]:
        """Yield (tokens, position) of each chunk of a prompt."""
        for position in range(0, tokens, self.chunk_size):
            yield min(self.chunk_size, tokens - position), position

    def encode(self, tiles: int) -> Work:
        """Return the work of the vision encoder for an image of `tiles` tiles."""
        vision, multiplied = self._config.vision, self._multiplied
        patches, tokens = vision.grid**2, vision.grid**2 + 1
        linear = patches * multiplied["patches"] + tokens * multiplied["layers"]
        linear += self._config.tokens_per_tile * multiplied["projector"]
        attention = 2 * tokens**2 * vision.hidden_size * vision.num_layers
        return Work(2 * tiles * (linear + attention), self._weights["vision_encoder"])

    def cross_kv(self, cross_tokens: int) -> Work:
        """Return the work of the keys and values of an image's cross-attended tokens."""
        nbytes = self._weights["cross_kv"] + cross_tokens * self._cross_token
        return Work(2 * cross_tokens * self._multiplied["cross_kv"], nbytes)

    def chunk(self, tokens: int, position: int, cross_tokens: int) -> Work:
        """Return the work of the decoder for `tokens` tokens of one prompt behind `position` cached ones, all of which
        read `cross_tokens` tokens of images."""
        read = self._cross_read(cross_tokens)
        pairs = tokens * position + tokens * (tokens + 1) // 2
        nbytes = self._weights["decoder"] + (position + tokens) * self._self_token + read * self._cross_token
        return Work(self._decoder_flops(tokens, pairs, tokens * read, rows=1), nbytes)

    def decode(self, sequences: int, tokens: int, cross_tokens: int) -> Work:
        """Return the work of one token of each of `sequences` sequences. Each has `tokens` tokens in the cache, the new
        one included, and reads `cross_tokens` tokens of its images."""
        read = self._cross_read(cross_tokens)
        nbytes = tokens * self._self_token + read * self._cross_token
        flops = self._decoder_flops(sequences, sequences * tokens, sequences * read, sequences)
        return Work(flops, self._weights["decoder"] + sequences * nbytes)

    def _cross_read(self, cross_tokens: int) -> int:
        """Count the tokens that cross-attention reads for a token with `cross_tokens` tokens of images."""
        return cross_tokens if self._cross_capacity is None else self._cross_capacity

    @property
    def _self_token(self) -> int:
        """Compute the bytes of one token's keys and values in all layers."""
        llm = self._config.llm
        return 2 * llm.num_layers * llm.num_kv_heads * llm.head_dim * self._size

    @property
    def _cross_token(self) -> int:
        llm = self._config.llm
        return 2 * len(self._config.cross_layers) * llm.num_kv_heads * llm.head_dim * self._size

    def _decoder_flops(self, tokens: int, pairs: int, cross_pairs: int, rows: int) -> float:
        """Count FLOPs. `pairs` and `cross_pairs`: pairs of a token and a token that it attends to, by self-attention
        and by cross-attention; `rows`: rows of logits."""
        llm = self._config.llm
        attention = pairs * llm.num_layers + cross_pairs * len(self._config.cross_layers)
        linear = tokens * self._multiplied["decoder"] + rows * llm.vocab_size * llm.hidden_size
        return 2 * (linear + 2 * attention * llm.num_heads * llm.head_dim)


def _rows_of(name: str) -> str:
    """Name the rows that a linear layer multiplies."""
    if ".patch_embedding." in name:
        return "patches"
    component, stage = part_of(name), stage_of_tensor(name)
    return {"vision_encoder": "layers", "projector": "projector"}.get(component, stage)
