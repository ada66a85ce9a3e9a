"""Tests the fourth byte of the pixels of a BMP, which may be alpha or nothing."""

from __future__ import annotations

import struct

import numpy as np

from nvlm_trt.image.decoding import load_image


def decoded(data: bytes) -> np.ndarray:
    """-> [height, width, 3]"""
    return np.asarray(load_image(data))


def bmp(pixels: np.ndarray) -> bytes:
    """Writes BGRA pixels [height, width, 4] with a header that has a mask for alpha (BITMAPV4HEADER)."""
    height, width = pixels.shape[:2]
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info = struct.pack("<IiiHHIIiiII", 108, width, -height, 1, 32, 3, pixels.size, 2835, 2835, 0, 0) + masks
    info = info.ljust(108, b"\0")
    return b"BM" + struct.pack("<IHHI", 14 + len(info) + pixels.size, 0, 0, 14 + len(info)) + info + pixels.tobytes()


def test_alpha_of_a_bmp_counts_if_any_pixel_has_it() -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., :3] = 30, 20, 10
    np.testing.assert_array_equal(decoded(bmp(pixels))[3, 3], [10, 20, 30])
    pixels[:4, :, 3] = 255
    np.testing.assert_array_equal(decoded(bmp(pixels))[[0, 7], 3], [[10, 20, 30], [255, 255, 255]])
