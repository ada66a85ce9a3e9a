"""Pictures to ask about: drawn once per size, and cheaply made new for the server."""

from __future__ import annotations

import functools
import io

from nvlm_trt.benchmark.workload import ImageSize, Picture

_QUALITY = 90
_BLOCK = 32  # pixels of a colour block: about as many bytes per pixel as a photograph has
_START, _COMMENT = b"\xff\xd8", b"\xff\xfe"


def encode(picture: Picture) -> bytes:
    """A JPEG. Its stamp is a comment: the server's image cache knows pictures by their bytes, so another stamp is
    another picture that is decoded, tiled and encoded anew, and stamping takes no time from the server."""
    drawn, stamp = draw(picture.size), picture.stamp.encode()
    return _START + _COMMENT + (len(stamp) + 2).to_bytes(2, "big") + stamp + drawn[len(_START) :]


@functools.lru_cache(maxsize=64)
def draw(size: ImageSize) -> bytes:
    """Smooth colour blocks, the same for every run."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng([size.width, size.height])
    columns, rows = -(-size.width // _BLOCK) + 1, -(-size.height // _BLOCK) + 1
    blocks = rng.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    picture = Image.fromarray(blocks).resize((size.width, size.height), Image.Resampling.BICUBIC)
    picture.save(encoded, "JPEG", quality=_QUALITY)
    return encoded.getvalue()
