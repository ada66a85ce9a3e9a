"""Tests first frames that are smaller than their animation: a browser shows its page around them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from nvlm_trt.image.decoding import load_image

SIZE, BOX = (16, 12), (5, 3, 13, 9)  # of the animation, of its first frame


def expected(colour: tuple[int, int, int]) -> np.ndarray:
    want = np.full((SIZE[1], SIZE[0], 3), 255)
    left, top, right, bottom = BOX
    want[top:bottom, left:right] = colour
    return want


def gif(
    size: tuple[int, int], box: tuple[int, int, int, int], extension: bytes = b"", local_palette: bool = False
) -> bytes:
    """Writes one frame of the colour with index 1; index 0 is black."""
    frame = Image.new("P", (box[2] - box[0], box[3] - box[1]), 1)
    frame.putpalette([0, 0, 0, 250, 120, 60, 1, 2, 3, 4, 5, 6])
    buffer = io.BytesIO()
    frame.save(buffer, "GIF", optimize=False)
    saved = buffer.getvalue()
    entries = 2 << (saved[10] & 7)
    palette, rest = saved[13 : 13 + 3 * entries], saved[13 + 3 * entries :]
    rest = rest[rest.index(b",") + 10 :]
    flags = 0x80 | saved[10] & 7

    def pair(x: int, y: int) -> bytes:
        return x.to_bytes(2, "little") + y.to_bytes(2, "little")

    place = pair(box[0], box[1]) + pair(*frame.size)
    screen = b"GIF89a" + pair(*size)
    if local_palette:
        return screen + b"\0\0\0" + extension + b"," + place + bytes([flags]) + palette + rest
    return screen + bytes([flags, 0, 0]) + palette + extension + b"," + place + b"\0" + rest


@pytest.mark.parametrize("local_palette", [False, True])
@pytest.mark.parametrize(
    "extension",
    [b"", b"!\xf9\x04\x00\x05\x00\x00\x00", b"!\xf9\x04\x01\x05\x00\x02\x00", b"!\xf9\x04\x09\x05\x00\x00\x00"],
    ids=["none", "opaque", "transparent", "disposed"],
)
def test_border_of_a_small_gif_frame_is_white(extension: bytes, local_palette: bool) -> None:
    data = gif(SIZE, BOX, extension, local_palette)
    np.testing.assert_array_equal(np.asarray(load_image(data)), expected((250, 120, 60)))


def test_gif_frame_beyond_the_screen_enlarges_it() -> None:
    assert load_image(gif((8, 8), BOX)).size == (13, 9)


@pytest.mark.parametrize("alpha", [False, True])
def test_border_of_a_small_webp_frame_is_white(alpha: bool) -> None:
    colour = (250, 120, 60)
    left, top, right, bottom = BOX
    size = (right - left, bottom - top)
    frames = [Image.new("RGBA" if alpha else "RGB", size, c) for c in (colour, (0, 0, 0))]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    data = bytearray(buffer.getvalue())
    data[24:27], data[27:30] = ((edge - 1).to_bytes(3, "little") for edge in SIZE)  # the canvas, in the chunk VP8X
    place = data.index(b"ANMF") + 8
    data[place : place + 3], data[place + 3 : place + 6] = ((at // 2).to_bytes(3, "little") for at in BOX[:2])
    pixels = np.asarray(load_image(bytes(data)))
    want = np.roll(expected(colour), (-1, -1), (0, 1))  # places are even
    np.testing.assert_array_equal(pixels, want)
