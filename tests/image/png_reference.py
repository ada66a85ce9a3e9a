"""Writes PNG files sample by sample, and decodes them slowly by the specification, with zlib and without Pillow."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction

SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # per pixel, by colour type
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
Pixels = Sequence[Sequence[Sequence[int]]]  # [height][width][samples]


def chunk(kind: bytes, body: bytes = b"", crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def header(width: int, height: int, depth: int = 8, colour_type: int = 2, interlaced: bool = False) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, interlaced))


def write_png(
    pixels: Pixels,
    depth: int,
    colour_type: int,
    *,
    before: bytes = b"",
    after: bytes = b"",
    interlaced: bool = False,
    filters: Sequence[int] = (0,),
    pieces: int = 1,
) -> bytes:
    """Writes chunks `before` and `after` the pixel data, which is in `pieces` chunks; rows take `filters` in turn."""
    height, width = len(pixels), len(pixels[0])
    data = zlib.compress(filtered(pixels, depth, interlaced, filters))
    step = -(-len(data) // pieces)
    idat = b"".join(chunk(b"IDAT", data[at : at + step]) for at in range(0, len(data), step))
    start = b"\x89PNG\r\n\x1a\n" + header(width, height, depth, colour_type, interlaced)
    return start + before + idat + after + chunk(b"IEND")


def filtered(pixels: Pixels, depth: int, interlaced: bool = False, filters: Sequence[int] = (0,)) -> bytes:
    out, number = bytearray(), 0
    for left, top, across, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        rows = [row[left::across] for row in pixels[top::down]]
        above = b""
        for row in rows:
            if not row:
                continue
            bits = "".join(f"{sample:0{depth}b}" for pixel in row for sample in pixel)
            bits += "0" * (-len(bits) % 8)
            line = int(bits, 2).to_bytes(len(bits) // 8, "big")
            step = max(1, len(row[0]) * depth // 8)
            kind = filters[number % len(filters)]
            number += 1
            out.append(kind)
            for index, value in enumerate(line):
                out.append((value - _predicted(kind, line, above or bytes(len(line)), index, step)) % 256)
            above = line
    return bytes(out)


def decode_on_white(data: bytes) -> list[list[list[float]]]:
    """-> [height][width][3] of 0 .. 255. Knows IHDR, PLTE, tRNS, IDAT."""
    chunks: dict[bytes, bytes] = {}
    at = 8
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        chunks[kind] = chunks.get(kind, b"") + data[at + 8 : at + 8 + length]
        at += length + 12
    width, height, depth, colour_type, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    count, raw = SAMPLES[colour_type], zlib.decompress(chunks[b"IDAT"])
    samples = [[[0] * count for _ in range(width)] for _ in range(height)]
    at = 0
    for left, top, across, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = range(left, width, across), range(top, height, down)
        if not columns or not rows:
            continue
        size, step = -(-len(columns) * count * depth // 8), max(1, count * depth // 8)
        above = bytes(size)
        for y in rows:
            kind, coded = raw[at], raw[at + 1 : at + 1 + size]
            at += 1 + size
            line = bytearray()
            for index in range(size):
                line.append((coded[index] + _predicted(kind, line, above, index, step)) % 256)
            above = bytes(line)
            number = int.from_bytes(line, "big")
            for i, x in enumerate(columns):
                for band in range(count):
                    shift = 8 * size - (i * count + band + 1) * depth
                    samples[y][x][band] = number >> shift & (1 << depth) - 1
    return [[_shown(pixel, depth, colour_type, chunks) for pixel in row] for row in samples]


def _predicted(kind: int, line: bytes | bytearray, above: bytes, index: int, step: int) -> int:
    left = line[index - step] if index >= step else 0
    up, corner = above[index], above[index - step] if index >= step else 0
    if kind == 4:
        guess = left + up - corner
        return min((abs(guess - left), 0, left), (abs(guess - up), 1, up), (abs(guess - corner), 2, corner))[2]
    return (0, left, up, (left + up) // 2)[kind]


def _shown(pixel: Sequence[int], depth: int, colour_type: int, chunks: dict[bytes, bytes]) -> list[float]:
    most = (1 << depth) - 1
    trns = chunks.get(b"tRNS", b"")
    alpha = Fraction(1)
    if colour_type == 3:
        palette = chunks[b"PLTE"]
        (index,) = pixel
        colour = [
            Fraction(palette[3 * index + band], 255) if 3 * index < len(palette) else Fraction(0) for band in range(3)
        ]
        if index < len(trns):
            alpha = Fraction(trns[index], 255)
    else:
        if colour_type in (4, 6):
            alpha = Fraction(pixel[-1], most)
        elif trns and [int.from_bytes(trns[i : i + 2], "big") & most for i in range(0, len(trns), 2)] == list(pixel):
            alpha = Fraction(0)
        bands = pixel[:3] if colour_type in (2, 6) else [pixel[0]] * 3
        colour = [Fraction(band, most) for band in bands]
    return [float(255 * (band * alpha + 1 - alpha)) for band in colour]
