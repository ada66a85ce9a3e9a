"""Bounds the images of a request. Imports no decoder: clients and configurations need the numbers alone."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from nvlm_trt.errors import TooLargeError
from nvlm_trt.validation import STRICT, CheckedFields

# Pillow refuses twice Image.MAX_IMAGE_PIXELS, which tests/image/test_decoding.py compares with this.
PILLOW_CEILING = 2 * 89_478_485

_MOST_SECONDS = 1e6


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ImageLimits(CheckedFields):
    """Bounds of the images of a request."""

    PREFIX: ClassVar[str] = "image limit "
    REMEDY: ClassVar[str] = f"use a positive number, for max_pixels at most {PILLOW_CEILING}, Pillow's ceiling"

    max_pixels: Annotated[int, Field(gt=0, le=PILLOW_CEILING)] = 64_000_000  # width x height in the header
    max_bytes: PositiveInt = 32 << 20  # of the encoded image
    max_images: PositiveInt = 16
    # of one image, from its bytes to its tiles; nvlm_trt.image.decoder keeps both
    max_decode_seconds: Annotated[float, Field(gt=0, le=_MOST_SECONDS)] = 5.0  # CPU time
    max_decode_memory: PositiveInt = 2 << 30  # bytes

    def check_count(self, images: int) -> None:
        """Check the number of images of a request. Raises TooLargeError."""
        if images > self.max_images:
            raise TooLargeError(f"the request has {images} images, at most {self.max_images} are allowed; send fewer")
