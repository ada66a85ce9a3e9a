"""Writes uncompressed TIFF files of any sample type, which Pillow cannot write."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import numpy as np

_FORMATS = {"u": 1, "i": 2, "f": 3}


def write_tiff(
    values: np.ndarray,
    *,
    order: str = "<",
    photometric: int = 1,
    planar: int = 1,
    bits: int | None = None,
    data: Sequence[bytes] = (),
    big: bool = False,
    tags: Mapping[int, Sequence[int]] = {},
) -> bytes:
    """values [height, width] or [height, width, samples] -> a file in which `data`, if given, replaces the strips."""
    height, width = values.shape[:2]
    samples = 1 if values.ndim == 2 else values.shape[2]
    ordered = values.astype(values.dtype.newbyteorder(order))
    planes = [ordered[..., band] for band in range(samples)] if planar == 2 and values.ndim == 3 else [ordered]
    strips = list(data) or [np.ascontiguousarray(plane).tobytes() for plane in planes]
    fields: dict[int, Sequence[int]] = {
        256: [width],
        257: [height],
        258: [bits or 8 * values.dtype.itemsize] * samples,
        259: [1],
        262: [photometric],
        273: [0] * len(strips),
        277: [samples],
        278: [height],
        279: list(map(len, strips)),
        284: [planar],
        339: [_FORMATS[values.dtype.kind]] * samples,
        **tags,
    }
    count, entry, start, inline = ("Q", "HHQ", 16, 8) if big else ("H", "HHI", 8, 4)
    size = 20 if big else 12
    place = start + struct.calcsize("<" + count) + len(fields) * size + inline
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42)
    head += struct.pack(order + ("HHQ" if big else "I"), *((8, 0, start) if big else (start,)))
    long = {tag for tag in fields if tag in (273, 279)}
    outside = {
        tag: len(numbers) * (4 if tag in long else 2)
        for tag, numbers in fields.items()
        if len(numbers) * (4 if tag in long else 2) > inline
    }
    first_strip = place + sum(outside.values())
    fields[273] = [first_strip + sum(map(len, strips[:i])) for i in range(len(strips))]
    entries, extra = b"", b""
    for tag in sorted(fields):
        numbers = fields[tag]
        packed = struct.pack(f"{order}{len(numbers)}{'I' if tag in long else 'H'}", *numbers)
        if tag in outside:
            value = struct.pack(order + ("Q" if big else "I"), place + len(extra))
            extra += packed
        else:
            value = packed.ljust(inline, b"\0")
        entries += struct.pack(order + entry, tag, 4 if tag in long else 3, len(numbers)) + value
    return head + struct.pack(order + count, len(fields)) + entries + bytes(inline) + extra + b"".join(strips)
