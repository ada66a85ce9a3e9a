"""Makes image files that are valid and small, and that take a decoder long: for attacks on a server, and for tests.

Each keeps to the limits of bytes and pixels. Files of different seeds differ in a byte that no decoder looks at.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping

from PIL import Image

_EDGE = 7_900  # 62 megapixels


def scans(seed: int = 0, edge: int = _EDGE, count: int = 1_000) -> bytes:
    """Make a grey progressive JPEG: each of `count` scans of some hundred bytes passes over all blocks.

    A scan refines coefficients that are all zero, so it is runs of up to 32767 blocks without any."""
    blocks = ((edge + 7) // 8) ** 2
    frame = struct.pack(">BHHB3B", 8, edge, edge, 1, 1, 0x11, 0)
    dc_codes = bytes([0x00, 1, *[0] * 15, 0])  # one code, a single bit: no difference
    ac_codes = bytes([0x10, 1, 1, *[0] * 14, 0xE0, 0x00])  # 0: a run of 2^14 blocks and 14 more bits; 10: one block
    runs = []
    while blocks >= 1 << 14:
        run = min(blocks, (1 << 15) - 1)
        runs += [(0, 1), (run - (1 << 14), 14)]
        blocks -= run
    runs += [(0b10, 2)] * blocks
    first = _segment(0xDA, bytes([1, 1, 0, 1, 63, 0x01])) + _bits(runs)
    refining = _segment(0xDA, bytes([1, 1, 0, 1, 63, 0x10])) + _bits(runs)
    return b"".join(
        (
            b"\xff\xd8",
            _segment(0xFE, struct.pack(">Q", seed)),
            _segment(0xDB, bytes([0, *[1] * 64])),
            _segment(0xC2, frame),
            _segment(0xC4, dc_codes + ac_codes),
            _segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + _bits([(0, 1)] * ((edge + 7) // 8) ** 2),
            first,
            refining * count,
            b"\xff\xd9",
        )
    )


def png(seed: int = 0, edge: int = _EDGE) -> bytes:
    """Make an interlaced PNG of zeros with 16 bits per channel."""
    header = struct.pack(">IIBBBBB", edge, edge, 16, 6, 0, 0, 1)
    compressor = zlib.compressobj(1)
    row = bytes(1 + 8 * edge)
    pixels = b"".join(compressor.compress(row) for _ in range(edge + edge // 64)) + compressor.flush()
    chunks = ((b"IHDR", header), (b"teSt", struct.pack(">Q", seed)), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in chunks)


def gif(seed: int = 0, edge: int = _EDGE) -> bytes:
    """Make a GIF of one colour: the longest codes of LZW all the way."""
    return _saved("GIF", edge, "P") + struct.pack(">Q", seed)


def tiff(seed: int = 0, edge: int = _EDGE) -> bytes:
    """Make a deflated TIFF of floating-point numbers, which are searched for their range."""
    return _saved("TIFF", edge, "F", compression="tiff_adobe_deflate") + struct.pack(">Q", seed)


def webp(seed: int = 0, edge: int = _EDGE) -> bytes:
    """Make a lossless WebP of one colour with transparency."""
    return _saved("WEBP", edge, "RGBA", lossless=True, method=0) + struct.pack(">Q", seed)


BOMBS: Mapping[str, Callable[[int], bytes]] = {"JPEG": scans, "PNG": png, "GIF": gif, "TIFF": tiff, "WEBP": webp}


def _saved(image_format: str, edge: int, mode: str, **options: object) -> bytes:
    encoded = io.BytesIO()
    Image.new(mode, (edge, edge)).save(encoded, image_format, **options)
    return encoded.getvalue()


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def _bits(codes: Iterable[tuple[int, int]]) -> bytes:
    """Join (value, length) codes, the last byte filled with ones, a zero byte after each 0xff."""
    joined = "".join(f"{value:0{length}b}" for value, length in codes)
    joined += "1" * (-len(joined) % 8)
    return int(joined, 2).to_bytes(len(joined) // 8, "big").replace(b"\xff", b"\xff\x00")
