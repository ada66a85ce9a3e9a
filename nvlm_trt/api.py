"""Defines the types that a caller sees: messages, sampling parameters, chats, answers. Imports nothing heavy."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from nvlm_trt.bounds import MAX_COUNT, MAX_PRIORITY, MAX_SEED, MAX_SLOTS
from nvlm_trt.constraint import KINDS
from nvlm_trt.constraint import Constraint as Constraint
from nvlm_trt.errors import ParameterError

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length", "cancelled"]
EncodedImage = bytes | str | os.PathLike[str]  # an image file's bytes; a client also takes its path

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_DRAFT_TOKENS = 32
BAN = -100  # a bias of this much is a ban

# --- what is asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextPart:
    """Text of a message, never markup: `<image>` in it is seven characters."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """Holds an image in a user's message, at its place among the other parts.

    Without `image`, the part stands for the next of the images that are sent beside the messages."""

    image: EncodedImage | None = None
    max_tiles: int | None = None  # of this image, thumbnail not counted; None: the request's


Part = TextPart | ImagePart


@dataclass(frozen=True)
class Message:
    """Holds one turn of a conversation. `content` is a list of parts in order, or a plain string.

    In a user's plain string, `<image>` marks the place of an image that is sent beside the messages, and `\\<image>`
    is the text `<image>`. Marks count only if images are sent beside the messages and no message has an ImagePart."""

    role: Role
    content: str | Sequence[Part]


def _as_tuple(value: Any) -> Any:
    """Makes a tuple from a single stop string, or from the list that JSON has."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _with_integer_keys(value: Any) -> Any:
    """Makes integers of the keys that JSON has, decimal text. Leaves anything else to the check of the type."""
    if isinstance(value, Mapping) and all(isinstance(key, str) and _DECIMAL.fullmatch(key) for key in value):
        return {int(key): bias for key, bias in value.items()}
    return value


def _as_constraint(value: Any) -> Any:
    """Makes a constraint from the object that JSON has."""
    return Constraint(**value) if isinstance(value, Mapping) and all(isinstance(key, str) for key in value) else value


_DECIMAL = re.compile("0|[1-9][0-9]{0,9}")
_StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
_StopStrings = Annotated[tuple[_StopString, ...], BeforeValidator(_as_tuple), Field(max_length=MAX_STOP_STRINGS)]
_TokenId = Annotated[int, Field(ge=0)]
_Bias = Annotated[float, Field(ge=BAN, le=-BAN)]
_Constraint = Annotated[Constraint | None, BeforeValidator(_as_constraint)]
_LogitBias = Annotated[dict[_TokenId, _Bias], BeforeValidator(_with_integer_keys), Field(max_length=MAX_BIASES)]


class SamplingParams(BaseModel):
    """Says how the tokens of one request are chosen. Raises ParameterError that names the wrong value.

    The descriptions complete the sentence "it is ..." of that error."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    # of each answer; cut at the engine's max_seq_len
    max_tokens: int = Field(256, ge=1, le=MAX_COUNT, description=f"an integer of at least 1, at most {MAX_COUNT}")
    # 0: greedy; top_k, top_p and min_p then change nothing
    temperature: float = Field(0.0, ge=0, le=100, description="a number from 0 to 100")
    top_k: int = Field(0, ge=0, le=MAX_COUNT, description=f"an integer of at least 0 (0: off), at most {MAX_COUNT}")
    top_p: float = Field(1.0, gt=0, le=1, description="a number above 0, at most 1")
    min_p: float = Field(0.0, ge=0, le=1, description="a number from 0 to 1")
    # for all ids in prompt and answer
    repetition_penalty: float = Field(1.0, ge=0.01, le=100, description="a number from 0.01 to 100")
    # for ids in the answer: once for each that occurs, and once for each time that it occurs
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    # token id -> what is added to its logit; the keys may be decimal text, as in JSON
    logit_bias: _LogitBias = Field(
        {}, description=f"up to {MAX_BIASES} token ids, each with a number from {BAN} (never drawn) to {-BAN}"
    )
    # None: sampling gives another answer every time
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="none or an integer from 0 to 2**64 - 1")
    # a single string is accepted too; the answer ends before a stop string
    stop: _StopStrings = Field((), description=f"up to {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LENGTH} characters")
    # no stop id is drawn, and no stop string ends the answer, before it has this many tokens
    min_tokens: int = Field(0, ge=0, le=MAX_COUNT, description=f"an integer of at least 0, at most {MAX_COUNT}")
    # answers to the one prompt, each in a slot of its own
    n: int = Field(1, ge=1, le=MAX_SLOTS, description="an integer from 1 to the number of the engine's slots")
    # alternatives reported beside each token; 0: no logprobs at all
    logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS, description=f"an integer from 0 to {MAX_LOGPROBS}")
    # True: generate until max_tokens
    ignore_eos: bool = Field(False, description="true or false")
    # what the whole text of each answer must be; the answer ends once nothing may follow, before min_tokens too
    constraint: _Constraint = Field(None, description=f"an object with one of {', '.join(KINDS)}")
    # tokens that are drafted from prompt and answer, to be checked in one step; 0: none
    draft_tokens: int = Field(0, ge=0, le=MAX_DRAFT_TOKENS, description=f"an integer from 0 to {MAX_DRAFT_TOKENS}")
    # requests of a lower number have their prompts read first
    priority: int = Field(
        0, ge=-MAX_PRIORITY, le=MAX_PRIORITY, description=f"an integer from {-MAX_PRIORITY} to {MAX_PRIORITY}"
    )

    def __init__(self, max_tokens: int = 256, **values: Any) -> None:
        values = {"max_tokens": max_tokens, **values}
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _sampling_error(values, str(error.errors()[0]["loc"][0])) from None
        if self.min_tokens > self.max_tokens:
            raise ParameterError(
                f"sampling parameter min_tokens = {self.min_tokens} is not allowed; it is at most max_tokens, "
                f"{self.max_tokens}"
            )
        if self.constraint and self.ignore_eos:
            raise ParameterError(
                "sampling parameter ignore_eos = True is not allowed with constraint, which says where the answer ends"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Reads parameters as a client sends them. Raises ParameterError for an unknown key."""
        return cls(**values)


def _sampling_error(values: Mapping[str, Any], name: str) -> ParameterError:
    known = SamplingParams.model_fields
    unknown = next((key for key in values if key not in known), None)
    if unknown is not None:
        return ParameterError(f"unknown sampling parameter {reprlib.repr(unknown)}; known are {', '.join(known)}")
    allowed = known[name].description
    return ParameterError(f"sampling parameter {name} = {reprlib.repr(values[name])} is not allowed; it is {allowed}")


@dataclass(frozen=True)
class ChatRequest:
    """Holds a conversation that ends with the user's turn.

    `images` are sent beside the messages. Each is an encoded file (bytes of a PNG, JPEG, ...), or the image tokens
    [tiles, T, hidden] of an image that the caller has encoded, in the memory of the backend. The features of such image
    tokens are not cached."""

    messages: Sequence[Message]
    images: Sequence[Any] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tiles: int | None = None  # per image, thumbnail not counted; None: the engine's limit


# --- what is answered ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoredToken:
    """Holds a token and the natural logarithm of the model's own probability of it: before logit_bias, penalties,
    temperature and filters, so of a token that they forbid too."""

    token_id: int
    logprob: float
    text: str  # U+FFFD for bytes that are no whole character; the name of a special token
    utf8: bytes  # the token's own part of the text, possibly a part of a character; empty for a special token

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold; the bytes are a list of integers, as in OpenAI's API."""
        return {"token_id": self.token_id, "logprob": self.logprob, "token": self.text, "bytes": list(self.utf8)}


@dataclass(frozen=True)
class TokenLogprob(ScoredToken):
    """Holds a token of an answer, beside the tokens that the model thought most probable in its place."""

    top: tuple[ScoredToken, ...]  # best first

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "top": [token.to_dict() for token in self.top]}


@dataclass(frozen=True)
class Usage:
    """Counts the tokens and times of one request, all its answers together. Times are seconds; times from submission on
    include waiting."""

    prompt_tokens: int  # in the LLM's sequence, image placeholders included
    completion_tokens: int
    image_tiles: int
    cross_tokens: int  # cross-attended tokens: image tokens, with NVLM-H also tile tags
    cached_images: int  # images whose features were in the cache
    encode_s: float  # decoding, encoding and cross-attention keys and values of the images
    queue_s: float  # from submission until the request has a slot, encoding included
    ttft_s: float | None  # from submission to the first token; None: no token was generated
    total_s: float  # from submission to the end of the last answer
    image_tokens: int = 0  # image placeholders among prompt_tokens
    cached_tokens: int = 0  # of prompt_tokens, those whose keys and values an earlier prompt has left


@dataclass(frozen=True)
class ImageCount:
    """Says what an image becomes: a grid of tiles, and a thumbnail if the grid has more than one."""

    width: int  # pixels, as the model sees the image: turned by EXIF's orientation
    height: int
    columns: int
    rows: int
    tiles: int  # thumbnail included
    tile_size: int  # pixels along an edge
    image_tokens: int  # image placeholders in the LLM's sequence
    cross_tokens: int  # cross-attended tokens, with NVLM-H tile tags included


@dataclass(frozen=True)
class PromptCount:
    """Counts the tokens of a request that is not run."""

    prompt_tokens: int  # in the LLM's sequence, image placeholders included
    image_tokens: int  # image placeholders
    cross_tokens: int
    images: tuple[ImageCount, ...]


@dataclass(frozen=True)
class Delta:
    """Holds one step of an answer: a token, and the text that the token completes (often none).

    The last delta of an answer has a finish_reason: "stop" (end-of-text token or stop string), "length" (max_tokens or
    the engine's max_seq_len) or "cancelled" (without a token). The end-of-text token has an id and an empty text. A
    request for n answers ends with the n-th finish_reason; the deltas of its answers come mixed.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] = field(default_factory=list)  # one per token id, if the request asks for logprobs
    finish_reason: FinishReason | None = None
    # in the last delta of the request; None too if the request was cancelled before it had a slot
    usage: Usage | None = None
    index: int = 0  # which of the n answers


@dataclass(frozen=True)
class Answer:
    """Holds a whole answer."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason | None
    usage: Usage | None


def merge_deltas(deltas: Sequence[Delta]) -> Delta:
    """Joins consecutive deltas of one answer; only the last may have a finish_reason."""
    return Delta(
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=[item for delta in deltas for item in delta.logprobs],
        finish_reason=deltas[-1].finish_reason,
        usage=deltas[-1].usage,
        index=deltas[-1].index,
    )


def merge_answers(deltas: Sequence[Delta]) -> list[Answer]:
    """Joins the deltas of a whole request to its answers, in the order of their indices. Each has the usage of the
    request."""
    by_index: dict[int, list[Delta]] = {}
    for delta in deltas:
        by_index.setdefault(delta.index, []).append(delta)
    usage = deltas[-1].usage if deltas else None
    wholes = [merge_deltas(by_index[index]) for index in sorted(by_index)]
    return [Answer(whole.text, whole.token_ids, whole.logprobs, whole.finish_reason, usage) for whole in wholes]
