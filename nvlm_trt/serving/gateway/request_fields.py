"""Types of the fields that the requests of several endpoints share, with the bounds of SamplingParams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from nvlm_trt.api import BAN, MAX_BIASES, MAX_DRAFT_TOKENS, MAX_LOGPROBS, MAX_STOP_LENGTH, MAX_STOP_STRINGS
from nvlm_trt.bounds import MAX_COUNT, MAX_PRIORITY, MAX_SEED, MAX_TILES
from nvlm_trt.serving.gateway.errors import unsupported


class Strict(BaseModel):
    """Refuses unknown keys, and values of another type: "0.7" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Temperature = Annotated[float, Field(ge=0, le=100)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=0, le=MAX_COUNT)]
MinP = Annotated[float, Field(ge=0, le=1)]
RepetitionPenalty = Annotated[float, Field(ge=0.01, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
# clients draw signed numbers of 64 bits, too: -1 stands for 2**64 - 1
Seed = Annotated[int, Field(ge=-(1 << 63), le=MAX_SEED)]
Stop = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
    Field(max_length=MAX_STOP_STRINGS, fail_fast=True),
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
]
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
MinTokens = Annotated[int, Field(ge=0, le=MAX_COUNT)]
DraftTokens = Annotated[int, Field(ge=0, le=MAX_DRAFT_TOKENS)]
Priority = Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]
Tiles = Annotated[int, Field(ge=1, le=MAX_TILES)]
TokenId = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]
LogitBias = Annotated[dict[TokenId, Annotated[float, Field(ge=BAN, le=-BAN)]], Field(max_length=MAX_BIASES)]


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # without effect: events are never padded


# --- what an answer must be ------------------------------------------------------------------------------------------


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class NamedSchema(Strict):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None  # without effect: the model is not told of the schema
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None  # without effect: every schema is kept


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Strict):
    """vLLM's way to ask for the same, and for more: one of the fields."""

    json_schema: dict[str, Any] | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: str | None = None
    choice: list[str] | None = None


# --- the fields of both endpoints ------------------------------------------------------------------------------------


class SamplingFields(Strict):
    """The fields of both completion endpoints. A field that is null or missing has its default."""

    model: str
    temperature: Temperature | None = None
    top_p: TopP | None = None
    n: Count | None = None
    stop: Stop | None = None
    seed: Seed | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # of NVLM's and other servers' own
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    ignore_eos: bool | None = None
    min_tokens: MinTokens | None = None
    priority: Priority | None = None
    draft_tokens: DraftTokens | None = None
    structured_outputs: StructuredOutputs | None = None
    # accepted without effect
    user: str | None = None

    UNSUPPORTED: ClassVar[tuple[str, ...]] = ()  # parameters of OpenAI's interface that this server has not

    @classmethod
    def refuse_unsupported(cls, raw: Mapping[str, Any]) -> None:
        """Raise HttpError for a parameter that is not supported, unless its value asks for nothing."""
        for name in cls.UNSUPPORTED:
            if raw.get(name) not in (None, False):
                raise unsupported(name, f"{name} is not supported; leave it out")
        for name in ("guided_json", "guided_regex", "guided_choice"):
            if raw.get(name) is not None:
                kind = name.removeprefix("guided_")
                raise unsupported(name, f'{name} is not supported; send "structured_outputs": {{"{kind}": ...}}')

    @model_validator(mode="before")
    @classmethod
    def _drop_unsupported(cls, raw: Any) -> Any:
        return {key: value for key, value in raw.items() if key not in cls.UNSUPPORTED}
