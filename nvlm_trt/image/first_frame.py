"""Corrects what Pillow gets wrong about the first frame of an animation that is smaller than the animation."""

from __future__ import annotations

from PIL import ImageFile

from nvlm_trt.image.background import Box

_ANIMATED, _HAS_ALPHA = 0x02, 0x10  # flags of a WebP
_FLAGS_AT = 20  # behind the headers of RIFF and of the chunk VP8X


def with_alpha(data: bytes) -> bytes:
    """Returns an animated WebP marked as transparent: without the mark, Pillow makes the border of a small frame black.
    Returns other files as they are."""
    if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X" and data[_FLAGS_AT : _FLAGS_AT + 1]:
        flags = data[_FLAGS_AT]
        if flags & _ANIMATED and not flags & _HAS_ALPHA:
            return data[:_FLAGS_AT] + bytes([flags | _HAS_ALPHA]) + data[_FLAGS_AT + 1 :]
    return data


def frame_box(image: ImageFile.ImageFile) -> Box:
    """Returns the place of the first frame in an opened image that is not loaded yet: Pillow gives the border of a
    GIF's frame the first colour."""
    extents = image.tile[0].extents if image.format == "GIF" and image.tile else None
    return extents or (0, 0, *image.size)
