"""Encodes requests and answers as tensors of the Triton model `nvlm`, for the model and for the client."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from nvlm_trt import strict_json
from nvlm_trt.api import Delta, ImageCount, Message, PromptCount, SamplingParams, ScoredToken, TokenLogprob, Usage
from nvlm_trt.errors import (
    ImageError,
    NvlmError,
    ParameterError,
    QueueFullError,
    RequestError,
    ServerError,
    TooLargeError,
)
from nvlm_trt.prompt.conversation import parse_messages

MODEL = "nvlm"
ENSEMBLE = "nvlm_ensemble"
IMAGE_ENCODER = "image_encoder"
PACKED_ONLY = "2"  # the version of `tiling` that takes packed tiles from `nvlm` only

# Parameters of a request to `nvlm`: one names the request by a secret of its client, the other says that the request
# asks for nothing but the end of those that bear this name.
CANCEL_TOKEN = "cancel_token"
CANCEL = "cancel"

# Triton streams only the message of an error, so the message begins with the kind of error.
_INVALID_REQUEST = "invalid request: "
_TOO_LARGE_REQUEST = "too large: "
_QUEUE_FULL = "queue full: "
# Triton's own words: once it exits or before it has loaded its models, and for a request that no region may hold
_NOT_READY = re.compile(r"has no available versions|Server not ready")
_TOO_LARGE = re.compile(r"Failed to increase the shared memory pool .*File too large")
_OF_AN_ENSEMBLE = re.compile(rf"^in ensemble '(?:{ENSEMBLE}|{IMAGE_ENCODER})', ")


def parse_conversation(prompt: bytes | None, messages: bytes | None) -> list[Message]:
    """Read the tensor `prompt` (a single user turn) or `messages` (JSON): a request has exactly one of the two."""
    if (prompt is None) == (messages is None):
        raise RequestError("send exactly one of the inputs `prompt` and `messages`")
    if prompt is not None:
        return [Message("user", _text(prompt, "prompt"))]
    assert messages is not None
    return parse_messages(_json(messages, "messages"))


def parse_sampling(data: bytes | None) -> SamplingParams:
    """Read the tensor `sampling_parameters`, a JSON object. A missing key has its default."""
    if data is None:
        return SamplingParams()
    values = _json(data, "sampling_parameters")
    if not isinstance(values, dict):
        raise ParameterError('sampling_parameters must be a JSON object, {"temperature": 0.7} for example')
    return SamplingParams.from_dict(values)


def encode_delta(delta: Delta) -> dict[str, npt.NDArray[Any]]:
    """Encode a delta as output tensors: index [1] and token_ids [tokens] int32, the others [1] strings, maybe empty."""
    logprobs = json.dumps([item.to_dict() for item in delta.logprobs], allow_nan=False) if delta.logprobs else ""
    return {
        "index": np.array([delta.index], np.int32),
        "text": _string(delta.text),
        "token_ids": np.array(delta.token_ids, np.int32),
        "logprobs": _string(logprobs),
        "finish_reason": _string(delta.finish_reason or ""),
        "usage": _string(json.dumps(asdict(delta.usage), allow_nan=False) if delta.usage else ""),
    }


def decode_delta(outputs: Mapping[str, npt.NDArray[Any]]) -> Delta:
    """Decode the output tensors of `encode_delta`."""
    logprobs, usage = outputs["logprobs"][0], outputs["usage"][0]
    return Delta(
        text=outputs["text"][0].decode(),
        token_ids=outputs["token_ids"].tolist(),
        logprobs=[_logprob(item) for item in json.loads(logprobs)] if logprobs else [],
        finish_reason=outputs["finish_reason"][0].decode() or None,
        usage=Usage(**json.loads(usage)) if usage else None,
        index=int(outputs["index"][0]),
    )


def encode_count(count: PromptCount) -> npt.NDArray[Any]:
    """Encode the answer to a request that is only counted, as the output tensor `count` [1]."""
    return _string(json.dumps(asdict(count), allow_nan=False))


def decode_count(output: npt.NDArray[Any]) -> PromptCount:
    """Decode the output tensor of `encode_count`."""
    count = json.loads(output[0])
    images = tuple(ImageCount(**image) for image in count.pop("images"))
    return PromptCount(**count, images=images)


def encode_error(error: NvlmError) -> str:
    """Write the message of an error response."""
    if isinstance(error, TooLargeError):
        return _INVALID_REQUEST + _TOO_LARGE_REQUEST + str(error)
    if isinstance(error, (RequestError, ImageError)):
        return _INVALID_REQUEST + str(error)
    if isinstance(error, QueueFullError):
        return _QUEUE_FULL + str(error)
    return str(error)


def decode_error(message: str) -> NvlmError:
    """Read a message of `encode_error`. An error without prefix, ours or Triton's, becomes a ServerError."""
    message = _OF_AN_ENSEMBLE.sub("", " ".join(message.split()))
    kinds: tuple[tuple[str, type[NvlmError]], ...] = (
        (_INVALID_REQUEST + _TOO_LARGE_REQUEST, TooLargeError),
        (_INVALID_REQUEST, RequestError),
        (_QUEUE_FULL, QueueFullError),
    )
    for prefix, kind in kinds:
        if message.startswith(prefix):
            return kind(message.removeprefix(prefix))
    if _NOT_READY.search(message):
        return ServerError("the server is stopping, or not ready yet; send the request to another one")
    if _TOO_LARGE.search(message):
        return TooLargeError("the request is larger than the server takes; send fewer or smaller images")
    return ServerError(message)


def _logprob(item: dict[str, Any]) -> TokenLogprob:
    top = tuple(ScoredToken(*_token_fields(token)) for token in item["top"])
    return TokenLogprob(*_token_fields(item), top)


def _token_fields(token: dict[str, Any]) -> tuple[int, float, str, bytes]:
    return token["token_id"], token["logprob"], token["token"], bytes(token["bytes"])


def _string(value: str) -> npt.NDArray[np.object_]:
    return np.array([value.encode()], np.object_)  # [1]


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8 ({error}); encode it as UTF-8") from None


def _json(data: bytes, name: str) -> Any:
    try:
        return strict_json.loads(_text(data, name))
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits also raises ValueError
        raise RequestError(f"{name} is not JSON ({error}); send valid JSON") from None
