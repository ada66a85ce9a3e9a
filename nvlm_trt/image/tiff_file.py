"""Corrects what Pillow gets wrong about TIFF files."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BITS, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 258, 262, 284, 339
_UNSIGNED, _SIGNED = 1, 2
_MAX_TAGS = 1 << 16  # BigTIFF could claim more
_FORMATS = {1: "B", 3: "H", 4: "I"}  # types of a tag


def black_is_zero(data: bytes) -> tuple[bytes, bool]:
    """Returns the file and whether its gray values of more than 8 bits are inverted (WhiteIsZero).

    The returned file says that they are not: Pillow inverts up to 8 bits, ignores the tag for some of the others and
    refuses the rest."""
    try:
        found = _tags(data)
        bits, photometric = _value(data, found, _BITS), _value(data, found, _PHOTOMETRIC)
    except (struct.error, KeyError, OverflowError):
        return data, False
    if photometric != 0 or bits <= 8:
        return data, False
    order, form, at = found[_PHOTOMETRIC]
    patched = bytearray(data)
    struct.pack_into(order + form, patched, at, 1)
    return bytes(patched), True


def correct_planes(image: TiffImageFile) -> None:
    """Corrects how an opened image of 16-bit samples in separate planes is read: Pillow reads 8-bit samples."""
    tags = image.tag_v2
    if tags.get(_PLANES) != 2 or set(tags.get(_BITS, ())) != {16} or image.use_load_libtiff:
        return
    order = "L" if tags.prefix == b"II" else "B"
    image.tile = [tile._replace(args=(f"{tile.args[0]};16{order}", *tile.args[1:])) for tile in image.tile]


def gray_values(image: Image.Image) -> tuple[npt.NDArray[Any], float | None] | None:
    """Returns the gray values [height, width] of a loaded image, of any format, whose samples are signed or have more
    than 8 bits, and the value that is white as `gray_to_rgb` has it. None for other images."""
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    bits, (sample_format, *_) = tags.get(_BITS, ()), tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))
    if image.mode == "F":
        return np.asarray(image), 1.0
    if image.mode.startswith("I"):
        values = np.asarray(image)  # uint16 or int32
        if bits == (32,) and sample_format == _UNSIGNED:
            values = values.view(np.uint32)
        return values, 4095.0 if bits == (12,) else 65535.0
    if image.mode == "L" and sample_format == _SIGNED:
        return np.asarray(image).view(np.int8), None
    return None


def _tags(data: bytes) -> dict[int, tuple[str, str, int]]:
    """Returns the tags of the first image that hold one integer: tag -> byte order, its format, its place."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    count_format, entry_format, at = ("Q", "HHQ", 8) if big else ("H", "HHI", 4)
    (at,) = struct.unpack_from(order + ("Q" if big else "I"), data, at)
    (count,) = struct.unpack_from(order + count_format, data, at)
    at += struct.calcsize(order + count_format)
    tags = {}
    size = 20 if big else 12
    for entry in range(at, at + min(count, _MAX_TAGS) * size, size):
        tag, form, values = struct.unpack_from(order + entry_format, data, entry)
        if values == 1 and form in _FORMATS:
            tags[tag] = (order, _FORMATS[form], entry + struct.calcsize(order + entry_format))
    return tags


def _value(data: bytes, tags: dict[int, tuple[str, str, int]], tag: int) -> int:
    order, form, at = tags[tag]
    (value,) = struct.unpack_from(order + form, data, at)
    return int(value)
