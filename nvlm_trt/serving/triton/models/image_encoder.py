"""Encodes the tiles of images by the model `vision_encoder`, which runs in another process."""

from __future__ import annotations

from typing import Any

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.errors import EngineError, ImageError, RequestError
from nvlm_trt.serving.chat_tensors import VISION_ENCODER, decode_error
from nvlm_trt.serving.triton.models.pixel_tensor import pixel_tensor


class ImageEncoder:
    """Sends the tiles of one image at a time. Triton batches those of images that are sent concurrently."""

    def __init__(self, pb_utils: Any, image_type: str) -> None:
        """`image_type` is the type of the vision encoder's input, TYPE_FP32 for example."""
        self._pb_utils = pb_utils
        self._image_type = image_type

    def encode(self, pixel_values: FloatArray) -> Any:
        """Encode pixel_values [tiles, 3, E, E] into Triton's tensor of image tokens [tiles, T, hidden], on the device
        of the vision encoder. Blocks until they are encoded.

        Raises ImageError and EngineError."""
        pb_utils = self._pb_utils
        request = pb_utils.InferenceRequest(
            model_name=VISION_ENCODER,
            requested_output_names=["image_tokens"],
            inputs=[pixel_tensor(pb_utils, pixel_values, self._image_type)],
        )
        response = request.exec()
        if response.has_error():
            raise _error(response.error().message())
        return pb_utils.get_output_tensor_by_name(response, "image_tokens")


def _error(message: str) -> Exception:
    """Make an exception of the model's error message: Triton passes only the message from model to model."""
    error = decode_error(message)
    if isinstance(error, RequestError):
        return ImageError(str(error))
    return EngineError(f"the image was not encoded ({error}); the server's log has the details")
