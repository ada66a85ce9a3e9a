"""Turns images upright by the orientation in their EXIF metadata."""

from __future__ import annotations

from PIL import ExifTags, Image

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(image: Image.Image, exif: bytes) -> Image.Image:
    """Applies the orientation of an EXIF block. Ignores a damaged block, as viewers do: the pixels are whole."""
    try:
        block = Image.Exif()
        block.load(exif)
        method = _TRANSPOSE.get(block.get(ExifTags.Base.Orientation, 1))
    except MemoryError:  # the budget is at fault, not the image
        raise
    except Exception:  # Pillow's parser answers hostile bytes with many exception types
        return image
    return image if method is None else image.transpose(method)
