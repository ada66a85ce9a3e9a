"""Implements the model `tiling`: encoded images -> tiles [n, 3, E, E] of all images, and the number of each image's."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nvlm_trt.errors import ImageError, NvlmError, RequestError
from nvlm_trt.image.decoder import ImageDecoder
from nvlm_trt.image.tiling import normalise_tiles
from nvlm_trt.limits import EngineLimits
from nvlm_trt.serving.chat_tensors import ENSEMBLE, MODEL, PACKED_ONLY
from nvlm_trt.serving.sent_images import image_files
from nvlm_trt.serving.triton.models.inputs import input_array, request_parameters
from nvlm_trt.serving.triton.models.packed_tiles import unpack_tiles
from nvlm_trt.serving.triton.models.parameters import image_limits, read_parameters
from nvlm_trt.serving.triton.models.responses import Responses


class TilingModel:
    """A python model without state. Decodes and resizes one image at a time, in another process.

    `nvlm` sends the tiles of an image that it has decoded, packed, in the place of the image. One version takes nothing
    else: its instances are never busy with decoding."""

    def __init__(self, pb_utils: Any) -> None:
        self._pb_utils = pb_utils
        self._responses = Responses(pb_utils)

    def initialize(self, args: dict[str, str]) -> None:
        parameters = read_parameters(args)
        self._packed_only = args.get("model_version") == PACKED_ONLY
        self._image_type = parameters["image_type"]
        self._tile_size = int(parameters["tile_size"])
        self._engine_limits = EngineLimits(max_tiles=int(parameters["max_tiles"]))
        self._image_limits = image_limits(parameters)
        self._decoder = ImageDecoder(self._image_limits, workers=1)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._respond(request) for request in requests]

    def finalize(self) -> None:
        self._decoder.close()

    def _respond(self, request: Any) -> Any:
        pb_utils = self._pb_utils
        image = input_array(pb_utils, request, "image")  # [images] bytes
        images = [] if image is None else image.tolist()
        max_tiles = input_array(pb_utils, request, "max_tiles")  # [1]
        most = self._engine_limits.max_tiles if max_tiles is None else int(max_tiles[0])
        try:
            request_parameters(request)
            tiles = self._tile(images, most)
        except NvlmError as error:
            return self._responses.of_error(error)
        counts = np.array([len(image) for image in tiles], np.int32)
        return pb_utils.InferenceResponse(
            [
                self._pixel_tensor(normalise_tiles(np.concatenate(tiles))),  # [n, 3, E, E]
                pb_utils.Tensor("tiles_per_image", counts),  # [images]
            ]
        )

    def _tile(self, images: list[bytes], max_tiles: int) -> list[npt.NDArray[np.uint8]]:
        """Cut each image into RGB tiles [tiles, 3, E, E]."""
        if not images:
            raise RequestError(f"the request has 0 images, 1 to {self._image_limits.max_images} are allowed")
        self._engine_limits.check_max_tiles(max_tiles)
        tiles = []
        for index, data in enumerate(image_files(images, self._image_limits), start=1):
            try:
                packed = unpack_tiles(data, self._tile_size, self._engine_limits.tiles_per_image)
                tiles.append(self._decode(data, max_tiles) if packed is None else packed)
            except ImageError as error:
                where = "image: " if len(images) == 1 else f"image {index}: "
                raise ImageError(where + str(error).removeprefix("image: ")) from error
        return tiles

    def _decode(self, data: bytes, max_tiles: int) -> npt.NDArray[np.uint8]:
        if self._packed_only:
            raise ImageError(f"image: encoded, but only {MODEL} calls this model; send it to {MODEL} or {ENSEMBLE}")
        with self._decoder.turn() as turn:
            return turn.tiles(data, self._tile_size, max_tiles)  # [tiles, 3, E, E]

    def _pixel_tensor(self, pixels: npt.NDArray[np.float32]) -> Any:
        """Make the tensor `pixel_values` of pixels [n, 3, E, E], in the type that the vision encoder takes."""
        if self._image_type == "TYPE_BF16":  # NumPy has no bfloat16
            import torch

            tensor = torch.from_numpy(pixels).to(torch.bfloat16)
            return self._pb_utils.Tensor.from_dlpack("pixel_values", torch.utils.dlpack.to_dlpack(tensor))
        dtype = np.float16 if self._image_type == "TYPE_FP16" else np.float32
        return self._pb_utils.Tensor("pixel_values", pixels.astype(dtype, copy=False))
