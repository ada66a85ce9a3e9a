"""Bounds requests, and the shared memory through which tritonserver passes them to its python models."""

from __future__ import annotations

import os
from pathlib import Path

from nvlm_trt.backends.spec import TritonPlacement
from nvlm_trt.engine import Engine
from nvlm_trt.errors import ServerError
from nvlm_trt.image.decoding import ImageLimits
from nvlm_trt.serving.triton.repository import ENCODE_WORKERS, max_batch_tiles

_SHARED_MEMORY = Path("/dev/shm")
_SHARED_MEMORY_SLACK = 32 << 20
# prompt or messages, and sampling parameters: what is longer is refused in a few words, with or without the model
_TEXT_BYTES = 32 << 20


def largest_request(limits: ImageLimits) -> int:
    """Return the bytes of the largest request: the images that `limits` allow, and texts."""
    return limits.max_images * limits.max_bytes + _TEXT_BYTES


class SharedMemory:
    """Computes sizes of shared memory. Each python model has a region of its own, which grows and never shrinks."""

    def __init__(self, engine: Engine, placement: TritonPlacement, limits: ImageLimits) -> None:
        config = engine.config
        self._request = largest_request(limits)
        self._image = limits.max_bytes
        self._images = limits.max_images
        self._tiles = engine.limits.tiles_per_image
        self._batch = max_batch_tiles(engine, placement)
        self._pixels = 3 * config.vision.image_size**2 * 4  # of a tile
        self._tokens = config.tokens_per_tile * config.llm.hidden_size * 4  # of a tile

    @property
    def most_per_model(self) -> int:
        """Return the bytes that a model's region takes at most: one request comes to it at a time."""
        encoded_at_once = ENCODE_WORKERS * (self._image + self._tiles * self._tokens)
        nvlm = self._request + encoded_at_once + self._batch * self._tokens
        tiling = self._request + self._images * self._tiles * self._pixels
        vision_encoder = self._batch * (self._pixels + self._tokens)
        return max(nvlm, tiling, vision_encoder) + _SHARED_MEMORY_SLACK

    @property
    def largest_request_needs(self) -> int:
        """Return the bytes that the largest request takes in all regions together, through `nvlm` or the ensemble."""
        encoding = self._batch * (self._pixels + self._tokens)
        through_nvlm = self._request + self._image + self._tiles * (self._pixels + self._tokens) + self._image
        through_ensemble = self._request + encoding
        return max(through_nvlm, through_ensemble) + encoding + _SHARED_MEMORY_SLACK

    def check(self) -> None:
        """Raise ServerError if there is too little shared memory for the largest request."""
        needed = self.largest_request_needs
        try:
            status = os.statvfs(_SHARED_MEMORY)
        except OSError:
            return
        free = status.f_bavail * status.f_frsize
        if free < needed:
            raise ServerError(
                f"{_SHARED_MEMORY} has {free >> 20} MiB free, the largest request ({self._request >> 20} MiB) needs "
                f"about {needed >> 20} MiB there; enlarge it (docker run --shm-size={(needed >> 30) + 1}g)"
            )
