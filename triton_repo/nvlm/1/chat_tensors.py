"""What a Triton request of `nvlm` holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from nvlm_trt.backends.tensorrt.device_tokens import DeviceTokens
from nvlm_trt.errors import RequestError
from nvlm_trt.runtime.pipeline import ChatRequest
from nvlm_trt.serving.chat_tensors import parse_conversation, parse_sampling


def chat_request(request: Any, on_device: bool) -> ChatRequest:
    """`on_device` is that of `image_tokens`.

    Raises RequestError for what is wrong with the messages, the sampling parameters or the image tokens."""
    images = _array(request, "image")  # [images] bytes
    max_tiles = _array(request, "max_tiles")  # [1]
    encoded = image_tokens(request, on_device)
    if images is not None and encoded:
        raise RequestError("`image_tokens` are sent by the ensemble's earlier steps only; send images as `image`")
    return ChatRequest(
        messages=parse_conversation(_string(request, "prompt"), _string(request, "messages")),
        images=encoded if images is None else images.tolist(),
        sampling=parse_sampling(_string(request, "sampling_parameters")),
        max_tiles=None if max_tiles is None else int(max_tiles[0]),
    )


def ticket(request: Any) -> str | None:
    """Set if the request is the last step of the ensemble, run for an image that `nvlm` itself wants encoded."""
    value = _string(request, "ticket")
    return None if value is None else value.decode(errors="replace")


def image_tokens(request: Any, on_device: bool) -> list[Any]:
    """Tokens [n, T, hidden] of each image, if the request came through the ensemble; copied, the request may go.

    Arrays, or with `on_device` DeviceTokens, wherever Triton has put them."""
    tensor = pb_utils.get_input_tensor_by_name(request, "image_tokens")  # [tiles of all images, T, hidden]
    tiles = _array(request, "tiles_per_image")  # [images]
    if tensor is None or tiles is None:
        return []
    tokens = DeviceTokens.from_dlpack(tensor.to_dlpack()) if on_device else tensor.as_numpy().copy()
    if tiles.min(initial=1) < 1 or tiles.sum() != len(tokens):
        raise RequestError(f"tiles_per_image {tiles.tolist()} does not describe image_tokens of {len(tokens)} tiles")
    ends = np.cumsum(tiles)
    return [tokens[end - count : end] for count, end in zip(tiles, ends, strict=True)]


def _string(request: Any, name: str) -> bytes | None:
    array = _array(request, name)
    return None if array is None else array[0]


def _array(request: Any, name: str) -> npt.NDArray[Any] | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()
