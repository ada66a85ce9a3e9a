"""Makes small valid image files of every format that the product reads, and of some that it refuses."""

from __future__ import annotations

import contextlib
import functools
import io
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, features

from lab.reliability.mutations import png_chunk

WIDTH, HEIGHT = 60, 44
_ORIENTATION = 0x0112
_BIG = (7900, 8000)  # close to the largest number of pixels that is allowed by default


@dataclass(frozen=True)
class ValidFile:
    """Holds a file as Pillow writes it. `read` says that the product promises to decode it."""

    name: str
    data: bytes
    read: bool = True


@functools.lru_cache(maxsize=1)
def valid_files() -> tuple[ValidFile, ...]:
    """Encodes one file of each kind; leaves out the kinds that this Pillow cannot write."""
    kinds = [*_png(), *_jpeg(), *_tiff(), *_others()]
    made = [(name, _encoded(mode, options), True) for name, mode, options in kinds]
    made += [(name, _encoded(mode, options), False) for name, mode, options in _foreign()]
    return tuple(ValidFile(name, data, read) for name, data, read in made if data is not None)


@functools.lru_cache(maxsize=1)
def large_files() -> tuple[ValidFile, ...]:
    """Encodes files of few bytes and as many pixels as are allowed, and beyond."""
    black = Image.new("L", _BIG)
    gif = _saved(black, {"format": "GIF"}) or b""
    made = [
        ValidFile("large png", _saved(black, {"format": "PNG", "compress_level": 1}) or b""),
        ValidFile("large gif", gif),
        ValidFile("large tiff", _saved(black, {"format": "TIFF", "compression": "tiff_adobe_deflate"}) or b""),
        ValidFile("png of 900 megapixels", _black_png(30_000), read=False),
        ValidFile("gif of 4,295 megapixels", gif[:6] + b"\xff\xff\xff\xff" + gif[10:], read=False),
    ]
    return tuple(file for file in made if file.data)


def _black_png(edge: int) -> bytes:
    """Writes a black square of one bit per pixel, without ever holding its pixels."""
    packer = zlib.compressobj(9)
    row = bytes(1 + edge // 8)
    packed = b"".join([*(packer.compress(row) for _ in range(edge)), packer.flush()])
    header = struct.pack(">IIBBBBB", edge, edge, 1, 0, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), png_chunk(b"IDAT", packed), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _png() -> list[tuple[str, str, dict[str, Any]]]:
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        (f"png {mode}", mode, {"format": "PNG"}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I")
    ]
    kinds += [
        ("png L transparent", "L", {"format": "PNG", "transparency": 7}),
        ("png P transparent", "P", {"format": "PNG", "transparency": bytes(range(64))}),
        ("png RGB transparent", "RGB", {"format": "PNG", "transparency": (1, 2, 3)}),
        ("png animated", "RGB", {"format": "PNG", "save_all": True, "append_images": [_image("RGB", 1)]}),
        ("png rotated", "RGB", {"format": "PNG", "exif": _turned(6)}),
        ("png profile", "RGB", {"format": "PNG", "icc_profile": bytes(300)}),
    ]
    return kinds


def _jpeg() -> list[tuple[str, str, dict[str, Any]]]:
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        (f"jpeg {mode}{' progressive' * progressive}", mode, {"format": "JPEG", "progressive": progressive})
        for mode in ("L", "RGB", "CMYK")
        for progressive in (False, True)
    ]
    kinds += [(f"jpeg rotated {turn}", "RGB", {"format": "JPEG", "exif": _turned(turn)}) for turn in (3, 6, 8)]
    kinds += [
        ("jpeg 4:4:4", "RGB", {"format": "JPEG", "subsampling": 0, "quality": 100}),
        ("jpeg 4:2:0", "RGB", {"format": "JPEG", "subsampling": 2, "quality": 1}),
        ("jpeg restarts", "RGB", {"format": "JPEG", "restart_marker_blocks": 2}),
        ("jpeg profile", "RGB", {"format": "JPEG", "icc_profile": bytes(70_000)}),
        ("jpeg comment", "RGB", {"format": "JPEG", "comment": b"a comment", "optimize": True}),
        ("mpo", "RGB", {"format": "MPO", "save_all": True, "append_images": [_image("RGB", 1)]}),
    ]
    return kinds


def _tiff() -> list[tuple[str, str, dict[str, Any]]]:
    modes = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F")
    kinds: list[tuple[str, str, dict[str, Any]]] = [(f"tiff {mode}", mode, {"format": "TIFF"}) for mode in modes]
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "tiff_deflate", "zstd", "lzma"):
        kinds.append((f"tiff {compression}", "RGB", {"format": "TIFF", "compression": compression}))
    for compression in ("group3", "group4", "tiff_ccitt"):
        kinds.append((f"tiff {compression}", "1", {"format": "TIFF", "compression": compression}))
    kinds += [
        ("tiff pages", "RGB", {"format": "TIFF", "save_all": True, "append_images": [_image("RGB", 1)] * 3}),
        ("tiff big", "RGB", {"format": "TIFF", "big_tiff": True}),
        ("tiff rotated", "RGB", {"format": "TIFF", "tiffinfo": {_ORIENTATION: 6}}),
    ]
    return kinds


def _others() -> list[tuple[str, str, dict[str, Any]]]:
    kinds: list[tuple[str, str, dict[str, Any]]] = [(f"bmp {mode}", mode, {"format": "BMP"}) for mode in _BMP_MODES]
    kinds += [
        ("gif", "P", {"format": "GIF"}),
        ("gif transparent", "P", {"format": "GIF", "transparency": 5}),
        ("gif animated", "P", {"format": "GIF", "save_all": True, "append_images": [_image("P", 1)] * 2, "loop": 0}),
        ("webp", "RGB", {"format": "WEBP"}),
        ("webp alpha", "RGBA", {"format": "WEBP"}),
        ("webp lossless", "RGBA", {"format": "WEBP", "lossless": True}),
        ("webp rotated", "RGB", {"format": "WEBP", "exif": _turned(8)}),
        ("webp animated", "RGB", {"format": "WEBP", "save_all": True, "append_images": [_image("RGB", 1)]}),
        ("ppm", "RGB", {"format": "PPM"}),
        ("pgm", "L", {"format": "PPM"}),
        ("pgm 16", "I;16", {"format": "PPM"}),
        ("pbm", "1", {"format": "PPM"}),
        ("pfm", "F", {"format": "PPM"}),
    ]
    return kinds


def _foreign() -> list[tuple[str, str, dict[str, Any]]]:
    names = ("TGA", "PCX", "ICO", "SGI", "DDS", "JPEG2000", "EPS", "ICNS", "MSP", "SPIDER", "XBM", "QOI")
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        (name.lower(), {"MSP": "1", "XBM": "1", "SPIDER": "F"}.get(name, "RGB"), {"format": name}) for name in names
    ]
    if features.check("avif"):
        kinds += [(f"avif {mode}", mode, {"format": "AVIF"}) for mode in ("RGB", "RGBA")]
    return kinds


_BMP_MODES = ("1", "L", "P", "RGB", "RGBA")


def _image(mode: str, seed: int = 0) -> Image.Image:
    """Draws colour blocks with noise."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (4, 5, 4), dtype=np.uint8)
    image = Image.fromarray(blocks).resize((WIDTH, HEIGHT))
    if mode == "I;16":
        return Image.fromarray(generator.integers(0, 65536, (HEIGHT, WIDTH), dtype=np.uint16))
    if mode == "LAB":
        return Image.merge("LAB", image.convert("RGB").split())
    return image.convert("RGB").convert(mode) if mode not in ("RGBA", "LA") else image.convert(mode)


def _turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    return exif.tobytes()


def _encoded(mode: str, options: Mapping[str, Any]) -> bytes | None:
    return _saved(_image(mode), options)


def _saved(image: Image.Image, options: Mapping[str, Any]) -> bytes | None:
    """Encodes an image; None if this Pillow lacks the encoder."""
    encoded = io.BytesIO()
    with contextlib.suppress(Exception):
        image.save(encoded, **options)
        return encoded.getvalue()
    return None
