"""Triton's gRPC messages for the model `nvlm` (KServe v2): a chat to a request, a response to a delta."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2

from nvlm_trt.errors import RequestError
from nvlm_trt.prompt.encoder import Message
from nvlm_trt.runtime.generation import Delta
from nvlm_trt.runtime.sampling import SamplingParams
from nvlm_trt.serving.chat_tensors import MODEL, decode_delta, decode_error


def infer_request(
    prompt: str | None = None,
    messages: Sequence[Message | Mapping[str, str]] | None = None,
    images: Sequence[bytes] = (),
    sampling: SamplingParams | Mapping[str, Any] | None = None,
    max_tiles: int | None = None,
    request_id: str = "",
    model: str = MODEL,
) -> service_pb2.ModelInferRequest:
    """The server checks what is in it: every fault is reported by one place.

    Raises RequestError for what does not fit the message.
    """
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    if prompt is not None:
        _add_strings(request, "prompt", [prompt.encode(errors="surrogatepass")])
    if messages is not None:
        turns = [asdict(message) if isinstance(message, Message) else dict(message) for message in messages]
        _add_strings(request, "messages", [json.dumps(turns).encode()])
    if images:
        _add_strings(request, "image", images)
    if sampling is not None:
        values = asdict(sampling) if isinstance(sampling, SamplingParams) else dict(sampling)
        _add_strings(request, "sampling_parameters", [json.dumps(values).encode()])
    if max_tiles is not None:
        try:
            packed = struct.pack("<i", max_tiles)
        except struct.error:
            raise RequestError(f"max_tiles = {max_tiles!r} is not a 32-bit integer; send a small one") from None
        _add_input(request, "max_tiles", "INT32", 1, packed)
    return request


def delta_of(response: service_pb2.ModelStreamInferResponse) -> Delta | None:
    """None for a response without outputs, with which the server only says that there are no more.

    Raises RequestError, QueueFullError or ServerError if that is the response.
    """
    if response.error_message:
        raise decode_error(response.error_message)
    outputs = response.infer_response.outputs
    if not outputs:
        return None
    contents = response.infer_response.raw_output_contents
    return decode_delta(
        {output.name: _array(output.datatype, raw) for output, raw in zip(outputs, contents, strict=True)}
    )


def _add_strings(request: service_pb2.ModelInferRequest, name: str, values: Sequence[bytes]) -> None:
    # a string is its length, 4 bytes little-endian, then its bytes
    raw = b"".join(part for value in values for part in (struct.pack("<I", len(value)), value))
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
    strings, start = [], 0
    while start < len(raw):
        (length,) = struct.unpack_from("<I", raw, start)
        strings.append(raw[start + 4 : start + 4 + length])
        start += 4 + length
    return np.array(strings, np.object_)
