"""Corrects what Pillow gets wrong about TIFF files."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0")
_BITS, _PHOTOMETRIC, _SAMPLES, _PLANES, _SAMPLE_FORMAT = 258, 262, 277, 284, 339
_UNSIGNED, _SIGNED = 1, 2
_MAX_TAGS = 1 << 16  # BigTIFF could claim more
_FORMATS = {1: "B", 3: "H", 4: "I"}  # types of a tag


def as_pillow_reads(data: bytes) -> tuple[bytes, bool]:
    """Returns the file with two tags changed, and whether its gray values are then inverted (WhiteIsZero).

    Gray values that are signed or have more than 8 bits become BlackIsZero: Pillow ignores WhiteIsZero in some of them
    and refuses the rest. An image of one sample per pixel has no separate planes, whatever the file says."""
    try:
        tags = _tags(data)
        values = {tag: _value(data, place) for tag, place in tags.items()}
    except (struct.error, OverflowError):
        return data, False
    changes = []
    deep = values.get(_BITS, 1) > 8 or values.get(_SAMPLE_FORMAT) == _SIGNED
    if inverted := deep and values.get(_PHOTOMETRIC) == 0:
        changes.append(_PHOTOMETRIC)
    if values.get(_PLANES) == 2 and values.get(_SAMPLES, 1) == 1:
        changes.append(_PLANES)
    if not changes:
        return data, False
    patched = bytearray(data)
    for tag in changes:
        form, at = tags[tag]
        struct.pack_into(form, patched, at, 1)
    return bytes(patched), inverted


def correct_planes(image: TiffImageFile) -> None:
    """Corrects how an opened image of 16-bit samples in separate planes is read: Pillow reads 8-bit samples."""
    tags = image.tag_v2
    if tags.get(_PLANES) != 2 or set(tags.get(_BITS) or ()) != {16} or image.use_load_libtiff:
        return
    order = "L" if tags.prefix == b"II" else "B"
    tiles = []
    for tile in image.tile:
        assert isinstance(tile.args, tuple), tile
        tiles.append(tile._replace(args=(f"{tile.args[0]};16{order}", *tile.args[1:])))
    image.tile = tiles


def gray_values(image: Image.Image) -> tuple[npt.NDArray[Any], float | None] | None:
    """Returns the gray values [height, width] of a loaded image, of any format, whose samples are signed or have more
    than 8 bits, and the value that is white as `gray_to_rgb` has it. None for other images."""
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    bits, sample_formats = tags.get(_BITS, ()), tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))
    if image.mode == "F":
        return np.asarray(image), 1.0
    if image.mode.startswith("I"):
        values = np.asarray(image)  # uint16 or int32
        if bits == (32,) and sample_formats == (_UNSIGNED,):
            values = values.view(np.uint32)
        return values, 4095.0 if bits == (12,) else 65535.0
    if image.mode == "L" and sample_formats == (_SIGNED,):
        return np.asarray(image).view(np.int8), None
    return None


def _tags(data: bytes) -> dict[int, tuple[str, int]]:
    """Returns where the first image's tags stand that hold one integer: tag -> format, place."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] == b"+\0"
    count_format, entry_format, at = ("Q", "HHQ", 8) if big else ("H", "HHI", 4)
    (at,) = struct.unpack_from(order + ("Q" if big else "I"), data, at)
    (count,) = struct.unpack_from(order + count_format, data, at)
    at += struct.calcsize(order + count_format)
    tags = {}
    size = 20 if big else 12
    for entry in range(at, at + min(count, _MAX_TAGS) * size, size):
        tag, form, values = struct.unpack_from(order + entry_format, data, entry)
        if values == 1 and form in _FORMATS:
            tags[tag] = (order + _FORMATS[form], entry + struct.calcsize(order + entry_format))
    return tags


def _value(data: bytes, place: tuple[str, int]) -> int:
    (value,) = struct.unpack_from(place[0], data, place[1])
    return int(value)
