"""Describes the requests of a simulation, and makes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nvlm_trt.benchmark.load import OpenLoop
from nvlm_trt.benchmark.workload import Lengths
from nvlm_trt.errors import RequestError
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.prompt.encoder import EncodedPrompt
from nvlm_trt.prompt.image_tokens import count_image_tokens

_TEXT_IDS = 256  # bytes
WARM_UP = 0.2  # share of the requests that are not counted: the engine is idle when the first ones come


@dataclass(frozen=True)
class Ask:
    """One request."""

    at: float  # seconds from the start
    text_ids: np.ndarray  # [S]
    output_tokens: int
    warmup: bool


@dataclass(frozen=True)
class Traffic:
    """Requests that come at random times, a Poisson process. Two with equal fields are equal."""

    text_tokens: Lengths
    output_tokens: Lengths
    tiles: int  # of the one image of a request, thumbnail included; 0: no image
    requests: int
    seed: int = 0

    def asks(self, rate: float) -> Iterator[Ask]:
        """Yield the requests, on average `rate` per second. No prompt begins like another."""
        rng = np.random.default_rng([self.seed, 2])
        for number, at in enumerate(OpenLoop(rate, self.seed).arrivals(self.requests)):
            text_ids = rng.integers(0, _TEXT_IDS, self.text_tokens.draw(rng))
            yield Ask(at, text_ids, self.output_tokens.draw(rng), number < WARM_UP * self.requests)

    def prompt(self, config: NvlmConfig, tag_length: int, ask: Ask) -> EncodedPrompt:
        """Return the prompt of a request: its image, then its text, all of which reads the image."""
        in_llm, cross_tokens = count_image_tokens(config, self.tiles, tag_length)
        ids = np.concatenate([np.full(in_llm, config.image_token_id), ask.text_ids]).astype(np.int64)
        ranges = np.tile(np.array([0, cross_tokens], np.int32), (len(ids), 1))
        return EncodedPrompt(ids, ranges, in_llm, cross_tokens)

    def check(self, config: NvlmConfig, limits: EngineLimits, tag_length: int) -> None:
        """Raise RequestError if the longest request does not fit in a slot."""
        in_llm, cross_tokens = count_image_tokens(config, self.tiles, tag_length)
        longest = in_llm + self.text_tokens.high + self.output_tokens.high
        if longest > limits.max_seq_len:
            raise RequestError(
                f"a request has up to {longest} tokens ({in_llm} of its image), a slot holds {limits.max_seq_len}; "
                "raise --context, or lower --output-tokens, --text-tokens or --tiles"
            )
        limits.check_cross_tokens(cross_tokens)
