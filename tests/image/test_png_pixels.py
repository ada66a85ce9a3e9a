"""Compares decoded PNGs with a slow decoder that shares no code with Pillow, and checks what damage is forgiven."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import png_reference
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from png_reference import chunk, header, write_png

from nvlm_trt.errors import ImageError
from nvlm_trt.image.decoding import load_image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GRAY_ROWS = [[[value * 15] for value in range(8)] for _ in range(8)]
RGB_ROWS = [[[10 * y, 10 * x, 40] for x in range(8)] for y in range(8)]
EXPECTED = np.array(RGB_ROWS)
IDAT = zlib.compress(png_reference.filtered(RGB_ROWS, 8))


def decoded(data: bytes) -> np.ndarray:
    """-> [height, width, 3]"""
    return np.asarray(load_image(data)).astype(int)


@st.composite
def pngs(draw: st.DrawFn) -> bytes:
    colour_type = draw(st.sampled_from(sorted(png_reference.SAMPLES)))
    depth = draw(st.sampled_from(png_reference.DEPTHS[colour_type]))
    width, height = draw(st.integers(4, 11)), draw(st.integers(4, 9))
    most, count = (1 << depth) - 1, png_reference.SAMPLES[colour_type]
    # few colours, some of which share a byte with another: the transparent one occurs, and so do near misses
    base = draw(st.integers(0, most))
    pool = sorted({base, base ^ 1, base ^ (most ^ most >> 1), draw(st.integers(0, most)), most})
    entries = draw(st.integers(1, 1 << depth)) if colour_type == 3 else 0
    values = st.integers(0, entries - 1) if entries else st.sampled_from(pool)
    pixel = st.lists(values, min_size=count, max_size=count)
    colours = draw(st.lists(pixel, min_size=1, max_size=6))
    picks = draw(st.lists(st.integers(0, len(colours) - 1), min_size=width * height, max_size=width * height))
    rows = [[colours[picks[y * width + x]] for x in range(width)] for y in range(height)]
    before = b""
    if colour_type == 3:
        before = chunk(b"PLTE", draw(st.binary(min_size=3 * entries, max_size=3 * entries)))
        if draw(st.booleans()):
            before += chunk(b"tRNS", draw(st.binary(min_size=1, max_size=entries)))
    elif colour_type in (0, 2) and draw(st.integers(0, 3)):
        # bits above the depth do not count
        above = draw(st.integers(0, 65535)) & ~most
        before = chunk(
            b"tRNS", b"".join(struct.pack(">H", sample | above) for sample in draw(st.sampled_from(colours)))
        )
    return write_png(
        rows,
        depth,
        colour_type,
        before=before,
        interlaced=draw(st.booleans()),
        filters=draw(st.lists(st.integers(0, 4), min_size=1, max_size=5)),
        pieces=draw(st.integers(1, 4)),
    )


@settings(max_examples=300, deadline=None)
@given(pngs())
def test_every_kind_of_png_is_what_the_specification_says(data: bytes) -> None:
    want = np.array(png_reference.decode_on_white(data))
    # Pillow cuts samples of 16 bits to 8 before it mixes and rounds them
    np.testing.assert_allclose(decoded(data), want, atol=1.51 if data[24] == 16 else 0.51)


@pytest.mark.parametrize("key", [(0x1234, 0x1234, 0x1234), (0xFF00, 0xFF00, 0xFF00), (0x1200, 0x34, 0xFFFF)])
@pytest.mark.parametrize("interlaced", [False, True])
def test_transparent_16_bit_colour_is_compared_in_all_its_bits(key: tuple[int, ...], interlaced: bool) -> None:
    low, high = [k & 0xFF for k in key], [k & 0xFF00 for k in key]
    near = [[k ^ (1 << bit if band == b else 0) for b, k in enumerate(key)] for bit in range(16) for band in range(3)]
    others = [*near, low, [k | 0x0100 for k in low], high]
    colours = [list(key), *(colour for colour in others if colour != list(key))]
    rows = [[colours[(8 * y + x) % len(colours)] for x in range(8)] for y in range(8)]
    data = write_png(rows, 16, 2, before=chunk(b"tRNS", struct.pack(">3H", *key)), interlaced=interlaced, filters=[4])
    np.testing.assert_allclose(decoded(data), np.array(png_reference.decode_on_white(data)), atol=1)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_transparent_gray_of_each_depth_is_white(depth: int) -> None:
    most = (1 << depth) - 1
    for key in {0, 1, most // 2, most}:
        rows = [[[min(key, most)], [most - key], [0], [most]] for _ in range(4)]
        pixels = decoded(write_png(rows, depth, 0, before=chunk(b"tRNS", struct.pack(">H", key))))
        want = [255 if value == key else round(255 * value / most) for value in (key, most - key, 0, most)]
        np.testing.assert_array_equal(pixels[0, :, 0], want)


def test_index_beyond_the_palette_is_black() -> None:
    rows = [[[0], [1], [2], [200]] for _ in range(4)]
    pixels = decoded(write_png(rows, 8, 3, before=chunk(b"PLTE", bytes([9, 9, 9, 80, 80, 80]))))
    np.testing.assert_array_equal(pixels[0, :, 0], [9, 80, 0, 0])


# --- metadata --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metadata",
    [
        chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(bytes(3 << 20))),
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(3 << 20))),
        chunk(b"tEXt", b"workflow\0" + b"x" * (3 << 20)),
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(900 << 10))) * 90,  # above Pillow's bound of the sum
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(5 << 20))),
        chunk(b"iCCP", b"profile\0\0not deflated"),
        chunk(b"tEXt", b"Comment\0hello", crc=1),
        chunk(b"iTXt", b"no separators"),
        chunk(b"gAMA", b"") + chunk(b"pHYs", b"1") + chunk(b"tIME", b"") + chunk(b"sBIT", b"\xff" * 9),
        chunk(b"tRNS", b"\0\x0a\0\x0a\0\x28", crc=7),  # a transparent colour with a wrong checksum
        chunk(b"tRNS", b"\0\x0a"),  # of the wrong length
        chunk(b"prVt", bytes(100)),
        chunk(b"acTL", b"123"),
    ],
    ids=lambda metadata: metadata[4:8].decode(),
)
def test_metadata_does_not_matter(metadata: bytes) -> None:
    np.testing.assert_array_equal(decoded(write_png(RGB_ROWS, 8, 2, before=metadata)), EXPECTED)
    np.testing.assert_array_equal(decoded(write_png(RGB_ROWS, 8, 2, after=metadata)), EXPECTED)


@pytest.mark.parametrize("end", [b"", chunk(b"IEND")[:-1], chunk(b"IEND", crc=3), b"\0\0", b"garbage behind the end"])
def test_faults_behind_the_pixels_are_ignored(end: bytes) -> None:
    data = SIGNATURE + header(8, 8) + chunk(b"IDAT", IDAT) + end
    np.testing.assert_array_equal(decoded(data), EXPECTED)


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (header(8, 8) + chunk(b"IDAT", IDAT, crc=5) + chunk(b"IEND"), "chunk IDAT has a wrong checksum"),
        (chunk(b"IHDR", header(8, 8)[8:-4], crc=5) + chunk(b"IDAT", IDAT), "chunk IHDR has a wrong checksum"),
        (chunk(b"tEXt", b"a\0b") + header(8, 8) + chunk(b"IDAT", IDAT), "does not begin with IHDR"),
        (header(8, 8) + chunk(b"IDAT", IDAT)[:-9], "chunk IDAT is cut off"),
        (header(8, 8) + chunk(b"IDAT", IDAT[:-9]) + chunk(b"IEND"), "truncated"),
        (header(8, 8) + chunk(b"IEND"), "no pixel data"),
        (header(8, 8) + chunk(b"NEWS", b"") + chunk(b"IDAT", IDAT), "chunk NEWS is unknown and critical"),
        (header(8, 8) + b"\0\0\0\0\0\0\0\0" + chunk(b"IDAT", IDAT), "is no kind of chunk"),
        (header(8, 8, 8, 3) + chunk(b"IDAT", IDAT), "no palette"),
        (header(8, 8, 8, 3) + chunk(b"PLTE", b"12") + chunk(b"IDAT", IDAT), "chunk PLTE is invalid"),
        (header(8, 8, 4, 2) + chunk(b"IDAT", IDAT), "colour type 2 of 4 bits is not defined"),
        (header(8, 8) + chunk(b"tIME") * 100_001 + chunk(b"IDAT", IDAT), "more than 100000 chunks"),
        (b"", "does not begin with IHDR"),
    ],
)
def test_fault_before_the_pixels_is_one_line(body: bytes, detail: str) -> None:
    with pytest.raises(ImageError, match=rf"^image: truncated or corrupt \(.*{detail}.*\); save it again$"):
        load_image(SIGNATURE + body)


# --- animations ------------------------------------------------------------------------------------------------------


def control(width: int, height: int, left: int, top: int) -> bytes:
    return chunk(b"fcTL", struct.pack(">5I2H2B", 0, width, height, left, top, 1, 10, 0, 0))


FRAME = [[[200, 100, 50]] * 5 for _ in range(4)]
FRAME_DATA = chunk(b"fdAT", b"\0\0\0\1" + zlib.compress(png_reference.filtered(FRAME, 8)))
ANIMATION = chunk(b"acTL", struct.pack(">2I", 1, 0))


def test_default_image_that_is_no_frame_gives_way_to_the_first_frame() -> None:
    later = control(8, 8, 0, 0) + chunk(b"fdAT", b"\0\0\0\3" + IDAT)
    data = write_png(RGB_ROWS, 8, 2, before=ANIMATION, after=control(5, 4, 2, 1) + FRAME_DATA + later)
    want = np.full((8, 8, 3), 255)
    want[1:5, 2:7] = 200, 100, 50
    np.testing.assert_array_equal(decoded(data), want)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (ANIMATION + control(8, 8, 0, 0), control(5, 4, 2, 1) + FRAME_DATA),  # the default image is the first frame
        (b"", control(5, 4, 2, 1) + FRAME_DATA),  # no animation
        (ANIMATION, control(5, 4, 4, 1) + FRAME_DATA),  # a frame beyond the edge
        (ANIMATION, control(0, 4, 0, 0) + FRAME_DATA),
        (ANIMATION, FRAME_DATA),
        (ANIMATION, chunk(b"fcTL", b"1") + FRAME_DATA),
        (ANIMATION, control(5, 4, 2, 1)),
    ],
)
def test_default_image_is_shown_otherwise(before: bytes, after: bytes) -> None:
    np.testing.assert_array_equal(decoded(write_png(RGB_ROWS, 8, 2, before=before, after=after)), EXPECTED)
