"""Encodes images by the ensemble `image_encoder`, whose models `tiling` and `vision_encoder` run in other processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nvlm_trt.errors import EngineError, ImageError, RequestError
from nvlm_trt.serving.chat_tensors import IMAGE_ENCODER, decode_error
from nvlm_trt.serving.triton.models.packed_tiles import pack_tiles


class ImageEncoder:
    """Sends one image at a time through the ensemble. Triton batches the tiles of images that are sent concurrently."""

    def __init__(self, pb_utils: Any) -> None:
        self._pb_utils = pb_utils

    def encode_tiles(self, tiles: npt.NDArray[np.uint8]) -> Any:
        """Encode the RGB tiles [tiles, 3, E, E] of one image as `encode` does."""
        return self.encode(pack_tiles(tiles), max(1, len(tiles) - 1))  # the thumbnail is not counted

    def encode(self, data: bytes, max_tiles: int) -> Any:
        """Encode an image file into Triton's tensor of image tokens [tiles, T, hidden], on the device of the vision
        encoder. Blocks until it is encoded.

        Raises ImageError and EngineError."""
        pb_utils = self._pb_utils
        request = pb_utils.InferenceRequest(
            model_name=IMAGE_ENCODER,
            requested_output_names=["image_tokens"],
            inputs=[
                pb_utils.Tensor("image", np.array([data], np.object_)),
                pb_utils.Tensor("max_tiles", np.array([max_tiles], np.int32)),
            ],
        )
        response = request.exec()
        if response.has_error():
            raise _error(response.error().message())
        return pb_utils.get_output_tensor_by_name(response, "image_tokens")


def _error(message: str) -> Exception:
    """Make an exception of the ensemble's error message: Triton passes only the message from model to model."""
    error = decode_error(message)
    if isinstance(error, RequestError):
        return ImageError(str(error))
    return EngineError(f"the image was not encoded ({error}); the server's log has the details")
