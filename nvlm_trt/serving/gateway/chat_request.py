"""Defines the body of a chat completion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from nvlm_trt.serving.gateway.errors import unsupported
from nvlm_trt.serving.gateway.request_fields import Count, Logprobs, SamplingFields, Strict, Tiles

# --- messages --------------------------------------------------------------------------------------------------------


class TextContent(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImageContent(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl | str  # a bare string is the URL


UserContent = Annotated[TextContent | ImageContent, Field(discriminator="type")]


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: str | Annotated[list[TextContent], Field(fail_fast=True)]
    name: str | None = None  # without effect


class UserMessage(Strict):
    role: Literal["user"]
    content: str | Annotated[list[UserContent], Field(fail_fast=True)]
    name: str | None = None  # without effect


class AssistantMessage(Strict):
    """An earlier answer. Clients send it back with the empty fields that it had."""

    role: Literal["assistant"]
    content: str | Annotated[list[TextContent], Field(fail_fast=True)]
    name: str | None = None  # without effect
    refusal: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    tool_calls: list[Any] | None = Field(None, max_length=0)
    function_call: None = None
    audio: None = None


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]

# --- the request -----------------------------------------------------------------------------------------------------


class ChatCompletionRequest(SamplingFields):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Count | None = None
    max_tokens: Count | None = None  # max_completion_tokens counts if both are there
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    max_tiles: Tiles | None = None  # of every image
    modalities: list[Literal["text"]] | None = None
    # accepted without effect
    tools: list[Any] | None = None  # only with tool_choice "none"
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None

    UNSUPPORTED: ClassVar[tuple[str, ...]] = (
        "audio",
        "function_call",
        "functions",
        "moderation",
        "prediction",
        "reasoning_effort",
        "verbosity",
        "web_search_options",
    )

    @classmethod
    def refuse_unsupported(cls, raw: Mapping[str, Any]) -> None:
        super().refuse_unsupported(raw)
        if raw.get("tools") and raw.get("tool_choice") != "none":
            raise unsupported("tools", 'tools are not supported; leave tools out, or send "tool_choice": "none"')
        if raw.get("tool_choice") not in (None, "none", "auto"):
            raise unsupported("tool_choice", "tools are not supported; leave tool_choice out")
        if isinstance(raw.get("modalities"), list) and raw["modalities"] != ["text"]:
            raise unsupported("modalities", "answers are text; leave modalities out")
