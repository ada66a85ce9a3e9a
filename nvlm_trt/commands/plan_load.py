"""Describes the requests that `nvlm-trt plan` is about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nvlm_trt.errors import EngineError

if TYPE_CHECKING:
    from nvlm_trt.planner.design import EngineDesign


@dataclass(frozen=True)
class Load:
    """One request of the plan, and how many of them are decoded at once."""

    text_tokens: int
    tiles: int
    in_llm: int  # tokens of the image in the LLM's sequence
    cross_tokens: int
    concurrency: int

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.in_llm

    @classmethod
    def of(cls, design: EngineDesign, text_tokens: int, tiles: int | None, concurrency: int) -> Load:
        """Make a request of `tiles` tiles; None: of as many as fit. Raises EngineError for a prompt that the engine
        does not hold."""
        from nvlm_trt.prompt.image_tokens import count_image_tokens

        config, limits = design.config, design.limits
        if tiles is not None and tiles > config.tiles_per_image:
            raise EngineError(f"an image has at most {config.tiles_per_image} tiles, not {tiles}; lower --tiles")
        for count in range(config.tiles_per_image, -1, -1) if tiles is None else [tiles]:
            in_llm, cross = count_image_tokens(config, count, design.tag_length)
            if text_tokens + in_llm < limits.max_seq_len and cross <= limits.max_image_tokens:
                return cls(text_tokens, count, in_llm, cross, concurrency)
        if cross > limits.max_image_tokens:
            raise EngineError(
                f"{count} tiles have {cross} cross-attended tokens, the engine would hold {limits.max_image_tokens}; "
                "lower --tiles, or raise --max-image-tokens"
            )
        raise EngineError(
            f"a prompt of {text_tokens} text tokens and {count} tiles has {text_tokens + in_llm} tokens in the LLM, "
            f"the engine would hold {limits.max_seq_len} with the answer; lower --text-tokens or --tiles, or raise "
            "--context"
        )
