"""Reads the file of an image, with the limit of its size checked before it is read."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from nvlm_trt.bounded_file import FileTooLargeError, read_bounded
from nvlm_trt.errors import ImageError, RequestError
from nvlm_trt.image.file_signature import foreign_format
from nvlm_trt.image.image_limits import ImageLimits

_NUMBERED = re.compile(r"(?P<before>(invalid request: )?)image( (?P<number>[1-9][0-9]{0,5}))?: ")


def read_image_file(path: Path | str | os.PathLike[str], limits: ImageLimits | None = None) -> bytes:
    """Returns the bytes of an image file. Decodes nothing.

    Raises RequestError for a file that cannot be read or is not a regular file; ImageError that names the file for one
    that is empty, larger than `limits` or plainly no image."""
    limits = limits or ImageLimits()
    name = os.fspath(path)
    try:
        data = read_bounded(name, limits.max_bytes)
    except FileTooLargeError as error:
        raise ImageError(f"image {name}: {error.strerror}; compress it") from None
    except OSError as error:
        raise RequestError(f"cannot read image {name} ({error.strerror}); name a readable image file") from None
    if not data:
        raise ImageError(f"image {name}: 0 bytes; name an encoded image")
    if foreign := foreign_format(data):
        raise ImageError(f"image {name}: {foreign.name}, not a readable format; {foreign.remedy}")
    return data


@contextlib.contextmanager
def naming_files(paths: Sequence[Path]) -> Iterator[None]:
    """Puts the name of the file into errors that say "image: ..." or "image 2: ...", here or on a server."""
    try:
        yield
    except (ImageError, RequestError) as error:
        match = _NUMBERED.match(str(error))
        index = int(match["number"] or 1) - 1 if match else len(paths)
        if match is None or index >= len(paths):
            raise
        raise type(error)(f"{match['before']}image {paths[index]}: {str(error)[match.end() :]}") from None
