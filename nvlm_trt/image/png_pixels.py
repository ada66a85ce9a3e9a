"""Decodes the pixels of a PNG. Pillow inflates and unfilters; transparent colours are found here, in all their bits."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageChops

from nvlm_trt.image.background import equal_pixels, on_white, paint_white, place_on_white
from nvlm_trt.image.deep_gray import gray_to_rgb
from nvlm_trt.image.orientation import upright
from nvlm_trt.image.png_file import GRAY, RGB, PngFile


def decode_png(png: PngFile) -> Image.Image:
    """Decodes to an upright RGB image on white. Raises many exceptions for corrupt pixel data."""
    return upright(place_on_white(_rgb(png), png.size, png.box), png.exif)


def _rgb(png: PngFile) -> Image.Image:
    depth, colour_type = png.header.depth, png.header.colour_type
    if png.key and colour_type == RGB and depth == 16:
        # takes the lower byte of each sample; done first, so that two decoded images are never held
        mask = equal_pixels(_decode(png, rawmode="RGB;16L"), [sample & 255 for sample in png.key])
        image = _decode(png)
        return paint_white(image, ImageChops.darker(mask, equal_pixels(image, [sample >> 8 for sample in png.key])))
    image = _decode(png)
    if colour_type == GRAY and depth == 16:
        return gray_to_rgb(np.asarray(image), 65535, transparent=png.key[0] if png.key else None)
    if not png.key:
        return on_white(image)
    # samples of 1, 2 and 4 bits are spread over 0 .. 255
    spread = [sample * 255 // ((1 << depth) - 1) for sample in png.key]
    return paint_white(image, equal_pixels(image.convert("L") if image.mode == "1" else image, spread))


def _decode(png: PngFile, rawmode: str | None = None) -> Image.Image:
    with Image.open(io.BytesIO(png.encoded()), formats=("PNG",)) as image:
        if rawmode:
            image.tile = [tile._replace(args=rawmode) for tile in image.tile]
        image.load()
        return image
