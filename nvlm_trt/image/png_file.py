"""Parses a PNG file into what its pixels need, as libpng does.

Pillow's own parser refuses valid files for the size of a text that nobody reads, or for its checksum.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GRAY, RGB, PALETTE, GRAY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6  # colour types
_DEPTHS = {GRAY: (1, 2, 4, 8, 16), RGB: (8, 16), PALETTE: (1, 2, 4, 8), GRAY_ALPHA: (8, 16), RGB_ALPHA: (8, 16)}
# 32 MiB could hold millions of empty chunks, which take seconds to walk over
_MAX_CHUNKS = 100_000


@dataclass(frozen=True)
class Header:
    width: int
    height: int
    depth: int  # bits of a sample
    colour_type: int
    interlaced: bool


@dataclass(frozen=True)
class PngFile:
    """Holds one still image. Pixels outside `box` are transparent."""

    header: Header  # of the pixels
    pixels: Sequence[memoryview]  # compressed
    size: tuple[int, int]  # width, height of the image that a browser shows
    box: tuple[int, int, int, int]  # left, top, right, bottom of the pixels in it
    palette: bytes = b""
    alphas: bytes = b""  # of the palette's first entries
    key: tuple[int, ...] = ()  # the samples of the transparent colour, of a GRAY or RGB image
    exif: bytes = b""

    def encoded(self) -> bytes:
        """Returns a PNG with the pixels and nothing else; the palette is filled up with black, as libpng does."""
        header = self.header
        fields = (header.width, header.height, header.depth, header.colour_type, 0, 0, header.interlaced)
        parts = [SIGNATURE, *_chunk(b"IHDR", struct.pack(">IIBBBBB", *fields))]
        if header.colour_type == PALETTE:
            parts += _chunk(b"PLTE", self.palette.ljust(768, b"\0"))
            if self.alphas:
                parts += _chunk(b"tRNS", self.alphas)
        return b"".join([*parts, *_chunk(b"IDAT", *self.pixels), *_chunk(b"IEND")])


def read_png(data: bytes) -> PngFile:
    """Parses a file with SIGNATURE. Raises ValueError for a file whose pixels cannot be read.

    Skips ancillary chunks that are damaged or out of place. An animation whose default image is not one of its frames
    gives its first frame."""
    chunks = _chunks(memoryview(data))
    kind, body = next(chunks, (b"", memoryview(b"")))
    if kind != b"IHDR":
        raise ValueError("the file does not begin with IHDR")
    header = _header(body)
    palette = alphas = exif = b""
    key: tuple[int, ...] = ()
    pixels: list[memoryview] = []
    frames = _FrameReader()
    pixels_end = False
    for kind, body in chunks:
        if kind == b"IDAT":
            if not pixels_end:
                pixels.append(body)
            continue
        pixels_end = bool(pixels)
        if kind == b"IEND":
            break
        if kind == b"PLTE" and not pixels_end and header.colour_type == PALETTE:
            if palette or not body or len(body) % 3 or len(body) > 768:
                raise ValueError("chunk PLTE is invalid")
            palette = bytes(body[: 3 << header.depth])
        elif kind == b"tRNS" and not pixels_end and not alphas and not key:
            if header.colour_type == PALETTE:
                alphas = bytes(body) if len(body) <= len(palette) // 3 else b""
            else:
                key = _key(header, body)
        elif kind == b"eXIf":
            exif = exif or bytes(body)
        elif kind in _FrameReader.KINDS:
            frames.add(kind, body, pixels_end)
        elif kind[:1].isupper() and kind != b"PLTE" and not pixels_end:
            raise ValueError(f"chunk {kind.decode()} is unknown and critical")
    if not pixels:
        raise ValueError("no pixel data")
    if header.colour_type == PALETTE and not palette:
        raise ValueError("no palette")
    size = (header.width, header.height)
    png = PngFile(header, pixels, size, (0, 0, *size), palette, alphas, key, exif)
    return frames.first(png) or png


def _chunks(view: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yields the kind and the body of each chunk, without damaged ancillary ones.

    Stops at the end of the file, and at a fault behind the pixel data: browsers show such an image. Raises ValueError
    for other faults."""
    at, seen_pixels = len(SIGNATURE), False
    for _ in range(_MAX_CHUNKS):
        if at == len(view):
            return
        kind, fault = b"", ""
        if at + 8 > len(view):
            fault = "a chunk is cut off"
        else:
            length, kind = struct.unpack_from(">I4s", view, at)
            end = at + 8 + length
            if not kind.isalpha():
                fault = f"{kind!r} is no kind of chunk"
            elif end + 4 > len(view):
                fault = f"chunk {kind.decode()} is cut off"
        if fault:
            if seen_pixels and kind != b"IDAT":
                return
            raise ValueError(fault)
        body = view[at + 8 : end]
        whole = zlib.crc32(body, zlib.crc32(kind)) == int.from_bytes(view[end : end + 4], "big")
        if whole:
            yield kind, body
        elif kind[:1].isupper():
            if seen_pixels and kind != b"IDAT":
                return
            raise ValueError(f"chunk {kind.decode()} has a wrong checksum")
        seen_pixels = seen_pixels or kind == b"IDAT"
        at = end + 4
    raise ValueError(f"more than {_MAX_CHUNKS} chunks")


def _header(body: memoryview) -> Header:
    if len(body) != 13:
        raise ValueError(f"chunk IHDR has {len(body)} bytes, not 13")
    width, height, depth, colour_type, compression, filters, interlace = struct.unpack(">IIBBBBB", body)
    if depth not in _DEPTHS.get(colour_type, ()):
        raise ValueError(f"colour type {colour_type} of {depth} bits is not defined")
    if compression or filters or interlace > 1:
        raise ValueError(f"compression {compression}, filter {filters} and interlace {interlace} are not all defined")
    return Header(width, height, depth, colour_type, bool(interlace))


def _key(header: Header, body: memoryview) -> tuple[int, ...]:
    """Returns the transparent colour, of which only the bits that a sample has count; () for an invalid one."""
    samples = {GRAY: 1, RGB: 3}.get(header.colour_type, 0)
    if not samples or len(body) != 2 * samples:
        return ()
    return tuple(value & (1 << header.depth) - 1 for value in struct.unpack(f">{samples}H", body))


def _chunk(kind: bytes, *bodies: bytes | memoryview) -> list[bytes | memoryview]:
    crc = zlib.crc32(kind)
    for body in bodies:
        crc = zlib.crc32(body, crc)
    length = sum(map(len, bodies))
    return [struct.pack(">I4s", length, kind), *bodies, struct.pack(">I", crc)]


class _FrameReader:
    """Collects the first frame of an animation (APNG) whose default image is not a frame."""

    KINDS = (b"acTL", b"fcTL", b"fdAT")

    def __init__(self) -> None:
        self._animated = self._default_is_frame = False
        self._controls: list[memoryview] = []  # of the first frame, and the next one's
        self._pixels: list[memoryview] = []

    def add(self, kind: bytes, body: memoryview, behind_pixels: bool) -> None:
        if kind == b"acTL":
            self._animated |= not behind_pixels and len(body) == 8 and any(body[:4])
        elif not behind_pixels:
            self._default_is_frame |= kind == b"fcTL"
        elif kind == b"fcTL":
            self._controls.append(body)
        elif len(self._controls) == 1:
            self._pixels.append(body[4:])  # after the sequence number

    def first(self, png: PngFile) -> PngFile | None:
        """Returns the frame; None if `png`, the default image, is the one to show."""
        if not self._animated or self._default_is_frame or not self._pixels or len(self._controls[0]) != 26:
            return None
        width, height, left, top = struct.unpack_from(">IIII", self._controls[0], 4)
        if not width or not height or left + width > png.size[0] or top + height > png.size[1]:
            return None
        header = replace(png.header, width=width, height=height)
        return replace(png, header=header, pixels=self._pixels, box=(left, top, left + width, top + height))
