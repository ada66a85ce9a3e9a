"""Makes images that no image cache knows."""

from __future__ import annotations

import secrets

from nvlm_trt.benchmark import images
from nvlm_trt.benchmark.questions import StampedImage
from nvlm_trt.benchmark.workload import ImageSize


def new_image(size: ImageSize) -> bytes:
    """Encodes a JPEG with the same pixels as every other image of its size, but with bytes of its own."""
    return images.encode(StampedImage(size, secrets.token_hex(8)))
