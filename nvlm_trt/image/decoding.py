"""Decodes image files to upright RGB images, within limits that are checked before any pixel is decoded."""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageFile, UnidentifiedImageError, features
from PIL.TiffImagePlugin import TiffImageFile

from nvlm_trt.errors import ImageError
from nvlm_trt.image import jpeg_file, png_file, tiff_file
from nvlm_trt.image.background import on_white, place_on_white
from nvlm_trt.image.deep_gray import gray_to_rgb
from nvlm_trt.image.file_signature import foreign_format, is_avif
from nvlm_trt.image.first_frame import frame_box, with_alpha
from nvlm_trt.image.image_limits import ImageLimits as ImageLimits
from nvlm_trt.image.orientation import upright
from nvlm_trt.image.png_pixels import decode_png

_READS_AVIF = "avif" in features.modules and features.check("avif") is True  # Pillow's wheels since 11.3
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", *(("AVIF",) if _READS_AVIF else ()))

# The bicubic kernel reads 4 source pixels across, so an edge shorter than that is invented, not resampled.
MIN_EDGE = 4
# The widest grid is 6:1 at the default max_tiles; beyond 200:1 a tile squeezes one axis more than 30-fold.
MAX_ASPECT = 200

# Pillow raises above PILLOW_CEILING pixels. It warns above half of it, and for damaged metadata: our checks decide.
for _category in (Image.DecompressionBombWarning, UserWarning):
    warnings.filterwarnings("ignore", category=_category, module=r"PIL\.")


def load_image(data: bytes, limits: ImageLimits | None = None) -> Image.Image:
    """Decodes to mode RGB what a browser shows on a white page: applies the EXIF orientation, puts transparency on
    white, takes an animation's first frame. docs/triton.md lists the rules.

    Raises ImageError for anything that is not a whole image within `limits`, in one of FORMATS: Pillow's other formats
    are seldom asked for and seldom fuzzed.
    """
    limits = limits or ImageLimits()
    if not data:
        raise ImageError("image: 0 bytes; send an encoded image")
    if len(data) > limits.max_bytes:
        raise ImageError(f"image: {len(data)} bytes encoded, at most {limits.max_bytes} are allowed; compress it")
    if data.startswith(png_file.SIGNATURE):
        return _load_png(data, limits)
    if foreign := foreign_format(data):
        raise ImageError(f"image: {foreign.name}, not a readable format; {foreign.remedy}")
    data, inverted = _prepared(data)
    with _open(data, limits) as image:
        _check_size(image.width, image.height, limits)
        try:
            return _decode(image, inverted)
        except MemoryError:
            raise
        except Exception as error:
            raise _corrupt(error) from None


def _load_png(data: bytes, limits: ImageLimits) -> Image.Image:
    try:
        png = png_file.read_png(data)
    except ValueError as error:
        raise _corrupt(error) from None
    _check_size(*png.size, limits)
    try:
        return decode_png(png)
    except MemoryError:  # the budget is at fault, not the image
        raise
    except Exception as error:
        raise _corrupt(error) from None


def _prepared(data: bytes) -> tuple[bytes, bool]:
    """Returns the file as Pillow reads it rightly, and whether its gray values are inverted."""
    if data.startswith(tiff_file.SIGNATURES):
        return tiff_file.as_pillow_reads(data)
    if data.startswith(jpeg_file.SIGNATURE):
        return jpeg_file.without_metadata(data), False
    return with_alpha(data), False


def _open(data: bytes, limits: ImageLimits) -> ImageFile.ImageFile:
    """Reads the header. Pillow's parsers answer hostile bytes with many types of exception."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        if is_avif(data) and not _READS_AVIF:
            raise ImageError(
                "image: an AVIF image, which this Pillow does not read; convert it to PNG or JPEG, or install Pillow "
                "11.3 or newer where nvlm-trt decodes it"
            ) from None
        known = ", ".join(FORMATS)
        raise ImageError(f"image: not a readable, non-empty {known}; convert it to PNG or JPEG") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"image: more than the {limits.max_pixels} pixels allowed; scale it down") from None
    except Exception as error:
        raise ImageError(f"image: header is corrupt ({_one_line(error)}); save it again") from None


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


def _decode(image: ImageFile.ImageFile, inverted: bool) -> Image.Image:
    """Decodes an opened image to an upright RGB image on white. Raises many exceptions for corrupt pixel data."""
    box = frame_box(image)
    if isinstance(image, TiffImageFile):
        tiff_file.correct_planes(image)
    image.load()
    gray = tiff_file.gray_values(image)
    if gray is not None:
        rgb = gray_to_rgb(*gray, inverted=inverted)
    elif image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        rgb = image.convert("RGB")  # many programs leave the fourth byte of each pixel empty
    else:
        rgb = on_white(image)
    if box != (0, 0, *image.size):
        rgb = place_on_white(rgb.crop(box), image.size, box)
    if isinstance(image, TiffImageFile):  # Pillow has applied its orientation
        return rgb
    return upright(rgb, image.info.get("exif", b""))


def _corrupt(error: Exception) -> ImageError:
    return ImageError(f"image: truncated or corrupt ({_one_line(error)}); save it again")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
