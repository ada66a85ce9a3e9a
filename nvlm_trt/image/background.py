"""Puts images on the white background that a browser's page has."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageChops

Box = tuple[int, int, int, int]  # left, top, right, bottom


def on_white(image: Image.Image) -> Image.Image:
    """Converts an image of up to 8 bits per sample to RGB, on white where it is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode in ("La", "PA"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    rgba = image.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba)
    return white


def paint_white(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Makes the pixels white where the mask, of mode L, is 255: in place if `image` is RGB, else in a copy."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    rgb.paste("white", (0, 0), mask)
    return rgb


def equal_pixels(image: Image.Image, samples: Sequence[int]) -> Image.Image:
    """Returns a mask of mode L: 255 where each band of `image`, of 8 bits, has the value in `samples`."""
    mask = Image.new("L", image.size, 255)
    for band, sample in enumerate(samples):
        equal = image.getchannel(band).point([255 * (value == sample) for value in range(256)])
        mask = ImageChops.darker(mask, equal)
    return mask


def place_on_white(frame: Image.Image, size: tuple[int, int], box: Box) -> Image.Image:
    """Places an RGB frame, of the size of `box`, on white of `size`. Returns the frame itself if it covers that."""
    if box == (0, 0, *size):
        return frame
    canvas = Image.new("RGB", size, "white")
    canvas.paste(frame, box[:2])
    return canvas
