"""Draws the images that a benchmark asks about: one per size, made new to the server by a stamp."""

from __future__ import annotations

import functools
import io

from nvlm_trt.benchmark.questions import StampedImage
from nvlm_trt.benchmark.workload import ImageSize

_QUALITY = 90
_BLOCK = 32  # pixels of a colour block: about as many bytes per pixel as a photograph has
_START, _COMMENT = b"\xff\xd8", b"\xff\xfe"


def encode(image: StampedImage) -> bytes:
    """Returns a JPEG that holds the stamp as a comment.

    The server's image cache compares the bytes of images, so the server decodes, tiles and encodes every image with a
    new stamp. A comment costs the server no time.
    """
    drawn, stamp = draw(image.size), image.stamp.encode()
    return _START + _COMMENT + (len(stamp) + 2).to_bytes(2, "big") + stamp + drawn[len(_START) :]


@functools.lru_cache(maxsize=64)
def draw(size: ImageSize) -> bytes:
    """Draws a JPEG of smooth colour blocks, the same in every run."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng([size.width, size.height])
    columns, rows = -(-size.width // _BLOCK) + 1, -(-size.height // _BLOCK) + 1
    blocks = rng.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    image = Image.fromarray(blocks).resize((size.width, size.height), Image.Resampling.BICUBIC)
    image.save(encoded, "JPEG", quality=_QUALITY)
    return encoded.getvalue()
