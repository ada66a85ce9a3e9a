"""Writes requests to and reads responses of the model `nvlm` as Triton's gRPC messages (KServe v2)."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from nvlm_trt.api import Delta, ImagePart, Message, PromptCount, SamplingParams, TextPart
from nvlm_trt.errors import RequestError
from nvlm_trt.serving.chat_tensors import CANCEL, CANCEL_TOKEN, MODEL, decode_count, decode_delta, decode_error

_FINAL = "triton_final_response"


def infer_request(
    prompt: str | None = None,
    messages: Sequence[Message | Mapping[str, Any]] | None = None,
    images: Sequence[bytes] = (),
    sampling: SamplingParams | Mapping[str, Any] | None = None,
    max_tiles: int | None = None,
    request_id: str = "",
    model: str = MODEL,
    count_only: bool = False,
) -> service_pb2.ModelInferRequest:
    """Make a request. Image parts of `messages` hold no images. The server checks the content, not this function.

    Raises RequestError for what cannot be sent: a max_tiles that does not fit its tensor, and values that JSON lacks.
    """
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    if prompt is not None:
        _add_strings(request, "prompt", [prompt.encode(errors="surrogatepass")])
    if messages is not None:
        turns = [_json_message(message) if isinstance(message, Message) else dict(message) for message in messages]
        _add_strings(request, "messages", [_json("messages", turns)])
    if images:
        _add_strings(request, "image", images)
    if sampling is not None:
        values = sampling.model_dump() if isinstance(sampling, SamplingParams) else dict(sampling)
        try:
            encoded = _json("sampling", values)
        except RequestError:
            SamplingParams.from_dict(values)  # names the parameter
            raise
        _add_strings(request, "sampling_parameters", [encoded])
    if max_tiles is not None:
        try:
            packed = struct.pack("<i", max_tiles)
        except struct.error:
            raise RequestError(f"max_tiles = {max_tiles!r} is not a 32-bit integer; send a small one") from None
        _add_input(request, "max_tiles", "INT32", 1, packed)
    if count_only:
        _add_input(request, "count_only", "BOOL", 1, b"\1")
    return request


def cancelling_request(token: str) -> service_pb2.ModelInferRequest:
    """Make a request that cancels those that carry `token` as their parameter CANCEL_TOKEN."""
    request = service_pb2.ModelInferRequest(model_name=MODEL)
    request.parameters[CANCEL].string_param = token
    return request


def is_last(response: service_pb2.ModelStreamInferResponse) -> bool:
    """Return whether no other response to the same request follows."""
    parameters = response.infer_response.parameters
    return bool(response.error_message) or (_FINAL in parameters and parameters[_FINAL].bool_param)


def says_cancelled(response: service_pb2.ModelStreamInferResponse) -> bool:
    """Return whether this is the response to a `cancelling_request`: one without outputs, not even an error."""
    return not response.error_message and not response.infer_response.outputs


def refuses_token(response: service_pb2.ModelStreamInferResponse) -> bool:
    """Return whether the server is of an earlier nvlm-trt, which does not know CANCEL_TOKEN."""
    return f"unknown request parameter {CANCEL_TOKEN!r}" in response.error_message


def delta_of(response: service_pb2.ModelStreamInferResponse) -> Delta | None:
    """Read the delta of a response; None for a response without outputs, which only ends the stream.

    Raises RequestError, QueueFullError or ServerError for an error response.
    """
    outputs = _outputs(response)
    return decode_delta(outputs) if outputs else None


def count_of(response: service_pb2.ModelStreamInferResponse) -> PromptCount | None:
    """Read the response to a request that is only counted; None for a response without outputs. Raises as `delta_of`
    does."""
    outputs = _outputs(response)
    return decode_count(outputs["count"]) if outputs else None


def _outputs(response: service_pb2.ModelStreamInferResponse) -> dict[str, npt.NDArray[Any]]:
    if response.error_message:
        raise decode_error(response.error_message)
    described, contents = response.infer_response.outputs, response.infer_response.raw_output_contents
    return {output.name: _array(output.datatype, raw) for output, raw in zip(described, contents, strict=True)}


def _json(name: str, value: Any) -> bytes:
    try:
        return json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{name} cannot be sent as JSON ({error}); pass numbers, strings, lists and dicts") from None


def _json_message(message: Message) -> dict[str, Any]:
    if isinstance(message.content, str):
        return {"role": message.role, "content": message.content}
    return {"role": message.role, "content": [_json_part(part) for part in message.content]}


def _json_part(part: TextPart | ImagePart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    return {"type": "image"} if part.max_tiles is None else {"type": "image", "max_tiles": part.max_tiles}


def _add_strings(request: service_pb2.ModelInferRequest, name: str, values: Sequence[bytes]) -> None:
    # the None, which is cut off again, keeps NumPy from making a matrix of bytes-like values
    raw = serialize_byte_tensor(np.array([*values, None], np.object_)[:-1]).item()
    _add_input(request, name, "BYTES", len(values), raw)


def _add_input(request: service_pb2.ModelInferRequest, name: str, datatype: str, length: int, raw: bytes) -> None:
    tensor = request.inputs.add()
    tensor.name = name
    tensor.datatype = datatype
    tensor.shape.append(length)
    request.raw_input_contents.append(raw)


def _array(datatype: str, raw: bytes) -> npt.NDArray[Any]:
    if datatype == "INT32":
        return np.frombuffer(raw, np.int32)
    assert datatype == "BYTES", datatype
    return deserialize_bytes_tensor(raw)
