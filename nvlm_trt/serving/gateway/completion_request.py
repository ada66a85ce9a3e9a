"""Defines the body of a text completion."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from nvlm_trt.serving.gateway.request_fields import Count, Logprobs, SamplingFields


class CompletionRequest(SamplingFields):
    """The body of POST /v1/completions. The prompt is one user turn: the models are chat models."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    max_tokens: Count | None = None
    logprobs: Logprobs | None = None

    UNSUPPORTED: ClassVar[tuple[str, ...]] = ("best_of", "echo", "suffix")

    @property
    def text(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]
