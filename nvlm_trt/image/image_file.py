"""Reads the file of an image, with the limit of its size checked before it is read."""

from __future__ import annotations

import os
from pathlib import Path

from nvlm_trt.bounded_file import FileTooLargeError, read_bounded
from nvlm_trt.errors import ImageError, RequestError
from nvlm_trt.image.file_signature import foreign_format
from nvlm_trt.image.image_limits import ImageLimits


def read_image_file(path: Path | str | os.PathLike[str], limits: ImageLimits | None = None) -> bytes:
    """Returns the bytes of an image file. Decodes nothing.

    Raises RequestError for a file that cannot be read or is not a regular file; ImageError that names the file for one
    that is empty, larger than `limits` or plainly no image."""
    limits = limits or ImageLimits()
    name = os.fspath(path)
    try:
        data = read_bounded(name, limits.max_bytes)
    except FileTooLargeError as error:
        raise ImageError(f"{name}: {error.strerror}; compress it") from None
    except OSError as error:
        raise RequestError(f"cannot read image {name} ({error.strerror}); name a readable image file") from None
    if not data:
        raise ImageError(f"{name}: 0 bytes; name an encoded image")
    if foreign := foreign_format(data):
        raise ImageError(f"{name}: {foreign.name}, not a readable image; {foreign.remedy}")
    return data


def naming_file(error: ImageError, path: Path | str) -> ImageError:
    """Returns an error of `load_image` that names the image's file."""
    return ImageError(f"{path}: {str(error).removeprefix('image: ')}")
