"""Reads the images that a client sends: files, or their base64 text, which JSON needs."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence

from nvlm_trt.errors import ImageError
from nvlm_trt.image.decoding import ImageLimits

# the first bytes of every file that nvlm_trt.image.decoding takes
_FILE_STARTS = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"GIF8",
    b"RIFF",
    b"BM",
    *(order + version for order in (b"II", b"MM") for version in (b"*\0", b"\0*", b"+\0", b"\0+")),
    *(b"P" + bytes([kind]) for kind in b"0123456fy"),
    b"\0\0\0",  # AVIF: the size of its first box
)
# The first characters of their base64 text, as far as these bytes decide them. No value begins like a file and like the
# text of one: the two sets of beginnings have nothing in common.
_TEXT_STARTS = tuple(base64.b64encode(start)[: len(start) * 8 // 6] for start in _FILE_STARTS)

_DATA = re.compile(rb"data:", re.IGNORECASE)
_DATA_URI = re.compile(rb"data:image/[a-z0-9.+-]{1,64};base64,", re.IGNORECASE)
_TEXT = re.compile(rb"[\t\n\r -~]{64}")  # no image file begins with so much text, except PPM
_WHAT_TO_SEND = "send the base64 text of an image file, without line breaks"

# Decoding keeps Python's lock, for which the next token of all answers waits: a chunk takes some 1 ms, and after it the
# thread that waits may have the lock.
_CHUNK = 1 << 17  # a multiple of 4


def image_files(values: Sequence[bytes], limits: ImageLimits) -> list[bytes]:
    """Return the image files of a request: decode values that are base64 text, and pass on all others.

    Raises TooLargeError for too many images. Raises ImageError, which names the image, for wrong base64, and before
    decoding for a file that would exceed the limit. Checks files no further."""
    limits.check_count(len(values))
    return [
        _image_file(value, limits, "image" if len(values) == 1 else f"image {number}")
        for number, value in enumerate(values, start=1)
    ]


def _image_file(value: bytes, limits: ImageLimits, name: str) -> bytes:
    if value.startswith(_FILE_STARTS):
        return value
    if _DATA.match(value):
        uri = _DATA_URI.match(value)
        if uri is None:
            raise ImageError(f"{name}: the data URI does not begin with data:image/TYPE;base64, as it must")
        return _decode(memoryview(value)[uri.end() :], limits, name)
    if value.startswith(_TEXT_STARTS):
        return _decode(memoryview(value), limits, name)
    if _TEXT.match(value):
        raise ImageError(f"{name}: a text that is not the base64 text of an image; {_WHAT_TO_SEND}")
    return value


def _decode(text: memoryview, limits: ImageLimits, name: str) -> bytes:
    padding = bytes(text[-2:]).count(b"=")
    size = len(text) * 3 // 4 - padding
    if size > limits.max_bytes:
        raise ImageError(f"{name}: {size} bytes encoded, at most {limits.max_bytes} are allowed; compress it")
    chunks = []
    try:
        for start in range(0, len(text), _CHUNK):
            chunks.append(base64.b64decode(text[start : start + _CHUNK], validate=True))
    except binascii.Error as error:
        reason = " ".join(str(error).split())
        raise ImageError(f"{name}: wrong base64 ({reason[:1].lower()}{reason[1:]}); {_WHAT_TO_SEND}") from None
    data = b"".join(chunks)
    if len(data) != size:  # the end of a chunk had padding
        raise ImageError(f"{name}: wrong base64 (padding before its end); {_WHAT_TO_SEND}")
    return data
