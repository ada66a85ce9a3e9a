"""Defines how answers are written as JSON: what the two completion endpoints have in common."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from nvlm_trt.api import Answer, Delta, PromptCount, TokenLogprob, Usage

Json = dict[str, Any]


class AnswerFormat(Protocol):
    """Writes one request's answers."""

    def opening(self, index: int) -> Json | None:
        """Return the chunk before the first of an answer, if the format has one."""
        ...

    def chunk(self, delta: Delta) -> Json:
        """Return the chunk of a delta, without its finish_reason if `closing` writes that."""
        ...

    def closing(self, delta: Delta) -> Json:
        """Return the chunk that ends an answer."""
        ...

    def envelope(self, choices: list[Json]) -> Json:
        """Return a chunk of some choices, possibly none."""
        ...

    def whole(self, answers: Sequence[Answer]) -> Json:
        """Return the body of a response that is not streamed, without its usage."""
        ...


@dataclass(frozen=True)
class Heading:
    """The fields that all chunks of a response share."""

    id: str
    model: str
    system_fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    def of(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "system_fingerprint": self.system_fingerprint,
        }


def scored_tokens(part: Delta | Answer) -> Sequence[TokenLogprob]:
    """Return the log-probabilities of an answer's tokens. The token that ends the text is no part of the answer."""
    tokens = part.logprobs
    return tokens[:-1] if part.finish_reason == "stop" and tokens and not tokens[-1].utf8 else tokens


def usage_json(usage: Usage) -> Json:
    """Write the usage of a whole request. `nvlm` has what OpenAI's interface has no place for."""
    return {
        **_tokens(
            usage.prompt_tokens, usage.completion_tokens, usage.image_tokens, usage.image_tiles, usage.cached_tokens
        ),
        "nvlm": {
            "cross_attended_tokens": usage.cross_tokens,
            "cached_images": usage.cached_images,
            "encode_s": usage.encode_s,
            "queue_s": usage.queue_s,
            "ttft_s": usage.ttft_s,
            "total_s": usage.total_s,
        },
    }


def running_usage_json(prompt: PromptCount, completion_tokens: int) -> Json:
    """Write the usage up to now of a request that is still answered. How many tokens were cached shows at its end."""
    tiles = sum(image.tiles for image in prompt.images)
    return _tokens(prompt.prompt_tokens, completion_tokens, prompt.image_tokens, tiles, cached=0)


def _tokens(prompt: int, completion: int, image_tokens: int, tiles: int, cached: int) -> Json:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "image_tokens": image_tokens, "image_tiles": tiles},
    }
