"""Decodes image files to upright RGB images, within limits that are checked before any pixel is decoded."""

from __future__ import annotations

import io
import warnings
from typing import Annotated, ClassVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from nvlm_trt.errors import ImageError, RequestError
from nvlm_trt.validation import STRICT, CheckedFields

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# The bicubic kernel reads 4 source pixels across, so an edge shorter than that is invented, not resampled.
MIN_EDGE = 4
# The widest grid is 6:1 at the default max_tiles; beyond 200:1 a tile squeezes one axis more than 30-fold.
MAX_ASPECT = 200

# Pillow raises above this number of pixels. It warns above half of it, and for damaged metadata: our checks decide.
_PILLOW_CEILING = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
_MOST_SECONDS = 1e6
for _category in (Image.DecompressionBombWarning, UserWarning):
    warnings.filterwarnings("ignore", category=_category, module=r"PIL\.")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ImageLimits(CheckedFields):
    """Bounds of the images of a request."""

    PREFIX: ClassVar[str] = "image limit "
    REMEDY: ClassVar[str] = f"use a positive number, for max_pixels at most {_PILLOW_CEILING}, Pillow's ceiling"

    max_pixels: Annotated[int, Field(gt=0, le=_PILLOW_CEILING)] = 64_000_000  # width x height in the header
    max_bytes: PositiveInt = 32 << 20  # of the encoded image
    max_images: PositiveInt = 16
    # of one image, from its bytes to its tiles; nvlm_trt.image.decoder keeps both
    max_decode_seconds: Annotated[float, Field(gt=0, le=_MOST_SECONDS)] = 5.0  # CPU time
    max_decode_memory: PositiveInt = 2 << 30  # bytes

    def check_count(self, images: int) -> None:
        """Check the number of images of a request. Raises RequestError."""
        if images > self.max_images:
            raise RequestError(f"the request has {images} images, at most {self.max_images} are allowed; send fewer")


def load_image(data: bytes, limits: ImageLimits | None = None) -> Image.Image:
    """Decodes to mode RGB: applies the EXIF orientation, puts transparency on white, takes an animation's first frame.

    Raises ImageError for anything that is not a whole image within `limits`, in one of FORMATS: Pillow's other formats
    are seldom asked for and seldom fuzzed.
    """
    limits = limits or ImageLimits()
    if not data:
        raise ImageError("image: 0 bytes; send an encoded image")
    if len(data) > limits.max_bytes:
        raise ImageError(f"image: {len(data)} bytes encoded, at most {limits.max_bytes} are allowed; compress it")
    # Pillow's parsers answer hostile bytes with many exception types (SyntaxError, struct.error, KeyError, ...)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except MemoryError:  # the budget is at fault, not the image
        raise
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise ImageError(f"image: not a readable, non-empty {known}; convert it to PNG or JPEG") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"image: more than the {limits.max_pixels} pixels allowed; scale it down") from None
    except Exception as error:
        raise ImageError(f"image: header is corrupt ({_one_line(error)}); save it again") from None
    with image:
        _check_size(image.width, image.height, limits)
        try:
            image.load()
            _make_upright(image)
            return _to_rgb(image)
        except MemoryError:
            raise
        except Exception as error:
            raise ImageError(f"image: truncated or corrupt ({_one_line(error)}); save it again") from None


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    """Raises ImageError for a size that must not be decoded or cannot be tiled in a useful way."""
    size = f"image: {width} x {height} pixels"
    if width * height > limits.max_pixels:
        raise ImageError(f"{size}, at most {limits.max_pixels} in all are allowed; scale it down")
    short, long = sorted((width, height))
    if short < MIN_EDGE:
        raise ImageError(f"{size}, each edge needs at least {MIN_EDGE}; send a larger image")
    if long > MAX_ASPECT * short:
        raise ImageError(f"{size}, one edge is more than {MAX_ASPECT} times the other; crop or pad it")


def _make_upright(image: Image.Image) -> None:
    """Applies the EXIF orientation in place. Ignores a damaged EXIF block, as viewers do: the pixels are whole."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:
        return


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_gray_to_rgb(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode in ("La", "PA"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    rgba = image.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba)
    return white


def _deep_gray_to_rgb(image: Image.Image) -> Image.Image:
    """Converts modes I;16*, I and F: Pillow's own convert clips at 255, which turns most of a 16-bit scan white.

    65535 is white in I;16, and in I within 0..65535 (so Pillow reads 16-bit PGM); 1 is white in F within 0..1. Other
    32-bit values have no agreed white: the image's own smallest .. largest value become black .. white.
    """
    values = np.asarray(image)  # [height, width] uint16, int32 or float32
    transparent = image.info.get("transparency")  # the grey value that a PNG's tRNS makes transparent
    hole = values == transparent if isinstance(transparent, int) else None
    finite = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(finite.min()), float(finite.max())
    white = 1.0 if image.mode == "F" else 65535.0
    if low < 0 or high > white:
        finite -= low
        white = (high - low) or 1.0
    finite *= 255.0 / white
    gray = np.rint(finite, out=finite).astype(np.uint8)
    if hole is not None:
        gray[hole] = 255
    return Image.fromarray(gray).convert("RGB")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
