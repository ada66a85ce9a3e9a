"""Packs the tiles of an image that `nvlm` has decoded into the place of the encoded image, for the model `tiling`.

`nvlm` decodes by itself, because only there a decoding can be cancelled and wait for its turn. Anybody may send packed
tiles: they are pixels, and `tiling` checks their shape.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from nvlm_trt.errors import ImageError

_MAGIC = b"NVLM tiles\n"
_HEADER = struct.Struct("<II")  # tiles, edge of a tile


def pack_tiles(tiles: npt.NDArray[np.uint8]) -> bytes:
    """Pack RGB tiles [tiles, 3, E, E]."""
    return b"".join((_MAGIC, _HEADER.pack(len(tiles), tiles.shape[-1]), tiles.data))


def unpack_tiles(data: bytes, tile_size: int, most: int) -> npt.NDArray[np.uint8] | None:
    """Return the RGB tiles [tiles, 3, E, E], or None for an encoded image.

    Raises ImageError for tiles of another edge than `tile_size`, for more than `most` tiles and for none."""
    if not data.startswith(_MAGIC):
        return None
    start = len(_MAGIC) + _HEADER.size
    count, edge = _HEADER.unpack(data[len(_MAGIC) : start]) if len(data) >= start else (0, 0)
    shape = (count, 3, tile_size, tile_size)
    if edge != tile_size or not 1 <= count <= most or len(data) - start != int(np.prod(shape)):
        raise ImageError("image: packed tiles that do not fit the engine; send a PNG or JPEG")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
