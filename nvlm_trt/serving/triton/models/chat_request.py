"""Reads a Triton request of the model `nvlm`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nvlm_trt.api import ChatRequest
from nvlm_trt.backends.base import BackendArray
from nvlm_trt.errors import ParameterError, RequestError
from nvlm_trt.image.decoding import ImageLimits
from nvlm_trt.serving.chat_tensors import parse_conversation, parse_sampling
from nvlm_trt.serving.sent_images import image_files
from nvlm_trt.serving.triton.models.cancel_token import PARAMETERS
from nvlm_trt.serving.triton.models.inputs import input_array, request_parameters

ImportTokens = Callable[[Any], BackendArray]


def read_chat(
    pb_utils: Any, request: Any, import_tokens: ImportTokens, image_limits: ImageLimits | None = None
) -> ChatRequest:
    """Read the tensors of a request.

    Raises RequestError for faulty messages, sampling parameters or image tokens, and for other parameters beside
    the tensors than PARAMETERS, ImageError for faulty base64."""
    request_parameters(request, PARAMETERS)
    images = input_array(pb_utils, request, "image")  # [images] bytes: files, or their base64 text
    max_tiles = input_array(pb_utils, request, "max_tiles")  # [1]
    encoded = _image_tokens(pb_utils, request, import_tokens)
    if images is not None and encoded:
        raise RequestError("`image_tokens` are sent by the ensemble's earlier steps only; send images as `image`")
    return ChatRequest(
        messages=parse_conversation(_string(pb_utils, request, "prompt"), _string(pb_utils, request, "messages")),
        images=encoded if images is None else image_files(images.tolist(), image_limits or ImageLimits()),
        sampling=parse_sampling(_string(pb_utils, request, "sampling_parameters")),
        max_tiles=None if max_tiles is None else int(max_tiles[0]),
    )


def reads_stream(pb_utils: Any, request: Any, answers: int) -> bool:
    """Return whether the client reads a stream. Without it, the answer is one response. Raises ParameterError if more
    than one answer is asked for without a stream."""
    stream = input_array(pb_utils, request, "stream")  # [1]
    is_read = stream is None or bool(stream[0])
    if answers > 1 and not is_read:
        raise ParameterError(
            f"sampling parameter n = {answers} is not allowed with `stream` false: one response holds one answer; read "
            "a stream"
        )
    return is_read


def is_only_counted(pb_utils: Any, request: Any) -> bool:
    """Return whether the client asks for the number of tokens alone."""
    count_only = input_array(pb_utils, request, "count_only")  # [1]
    return count_only is not None and bool(count_only[0])


def _image_tokens(pb_utils: Any, request: Any, import_tokens: ImportTokens) -> list[Any]:
    """Copy the image tokens [n, T, hidden] of each image; none unless the request came through nvlm_ensemble.

    Copied, because the request may be freed before its images are used."""
    tensor = pb_utils.get_input_tensor_by_name(request, "image_tokens")  # [tiles of all images, T, hidden]
    tiles = input_array(pb_utils, request, "tiles_per_image")  # [images]
    if tensor is None or tiles is None:
        return []
    tokens: Any = import_tokens(tensor)
    if tiles.min(initial=1) < 1 or tiles.sum() != len(tokens):
        raise RequestError(f"tiles_per_image {tiles.tolist()} does not describe image_tokens of {len(tokens)} tiles")
    ends = np.cumsum(tiles)
    return [tokens[end - count : end] for count, end in zip(tiles, ends, strict=True)]


def _string(pb_utils: Any, request: Any, name: str) -> bytes | None:
    array = input_array(pb_utils, request, name)
    return None if array is None else array[0]
