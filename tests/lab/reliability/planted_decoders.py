"""Decodes as the product does, with one planted fault each. Worker processes import these by name."""

from __future__ import annotations

import os
import time
from typing import Any

from lab.reliability.decode_worker import decode_and_tile
from nvlm_trt.errors import ImageError

PATTERN = b"IHDR"
_kept: list[bytes] = []


def crashes(data: bytes) -> Any:
    if PATTERN in data:
        os.abort()
    return decode_and_tile(data)


def hangs(data: bytes) -> Any:
    if PATTERN in data:
        time.sleep(60)
    return decode_and_tile(data)


def raises(data: bytes) -> Any:
    if PATTERN in data:
        raise KeyError("a parser's own error")
    return decode_and_tile(data)


def babbles(data: bytes) -> Any:
    if PATTERN in data:
        raise ImageError("one line\nand another")
    return decode_and_tile(data)


def refuses(data: bytes) -> Any:
    raise ImageError("image: refused")


def leaks(data: bytes) -> Any:
    _kept.append(os.urandom(1 << 20))
    raise ImageError("image: refused")
