"""Encoded images -> tiles [n, 3, E, E] of all images in order, and how many each image became."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils
from pixel_tensor import pixel_tensor

from nvlm_trt.errors import ImageError, NvlmError, RequestError
from nvlm_trt.image.decoding import ImageLimits, load_image
from nvlm_trt.image.tiling import tile_image
from nvlm_trt.serving.chat_tensors import encode_error


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        entries = json.loads(args["model_config"])["parameters"]
        self._image_type = entries.pop("image_type")["string_value"]
        parameters = {key: int(value["string_value"]) for key, value in entries.items()}
        self._tile_size = parameters["tile_size"]
        self._max_tiles = parameters["max_tiles"]
        self._limits = ImageLimits(**{name: parameters[name] for name in ("max_pixels", "max_bytes", "max_images")})

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        image = pb_utils.get_input_tensor_by_name(request, "image")
        images = [] if image is None else image.as_numpy().tolist()  # [images] bytes
        max_tiles = pb_utils.get_input_tensor_by_name(request, "max_tiles")
        try:
            tiles = self._tile(images, self._max_tiles if max_tiles is None else int(max_tiles.as_numpy()[0]))
        except NvlmError as error:
            return pb_utils.InferenceResponse(
                error=pb_utils.TritonError(encode_error(error), pb_utils.TritonError.INVALID_ARG)
            )
        counts = np.array([len(image) for image in tiles], np.int32)
        return pb_utils.InferenceResponse(
            [
                pixel_tensor(np.concatenate(tiles), self._image_type),  # [n, 3, E, E]
                pb_utils.Tensor("tiles_per_image", counts),  # [images]
            ]
        )

    def _tile(self, images: list[bytes], max_tiles: int) -> list[npt.NDArray[np.float32]]:
        """One array [tiles, 3, E, E] per image."""
        if not 1 <= len(images) <= self._limits.max_images:
            raise RequestError(f"the request has {len(images)} images, 1 to {self._limits.max_images} are allowed")
        if not 1 <= max_tiles <= self._max_tiles:
            raise RequestError(f"max_tiles = {max_tiles} is not allowed; it is an integer from 1 to {self._max_tiles}")
        tiles = []
        for index, data in enumerate(images, start=1):
            try:
                image = load_image(data, self._limits)
            except ImageError as error:
                where = "image: " if len(images) == 1 else f"image {index}: "
                raise ImageError(where + str(error).removeprefix("image: ")) from error
            tiles.append(tile_image(image, self._tile_size, max_tiles))
        return tiles
