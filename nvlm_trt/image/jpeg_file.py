"""Parses the header of a JPEG file into what its pixels need."""

from __future__ import annotations

SIGNATURE = b"\xff\xd8\xff"
_SCAN, _COMMENT = 0xDA, 0xFE
_APP0, _APP1, _APP14, _APP15 = 0xE0, 0xE1, 0xEE, 0xEF
# metadata that a decoder needs: the first two say how the colours are stored. Shorter ones libjpeg ignores, too.
_KEPT = {_APP0: (b"JFIF\0", 14), _APP14: (b"Adobe", 12), _APP1: (b"Exif\0", 6)}


def without_metadata(data: bytes) -> bytes:
    """Returns a JPEG without metadata that its pixels do not need: Pillow's parser refuses a whole image for a damaged
    colour profile or caption. Returns what it does not understand as it is."""
    view = memoryview(data)
    kept = [view[:2]]
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill bytes before a marker
            at += 1
            continue
        if marker == _SCAN or not 0xC0 <= marker <= _COMMENT or 0xD0 <= marker <= 0xD8:
            break
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if not _is_metadata(marker) or _is_needed(marker, data[at + 4 : min(end, at + 18)]):
            kept.append(view[at:end])
        at = end
    return b"".join([*kept, view[at:]])


def _is_metadata(marker: int) -> bool:
    return _APP0 <= marker <= _APP15 or marker == _COMMENT


def _is_needed(marker: int, body: bytes) -> bool:
    start, least = _KEPT.get(marker, (b"", 1 << 16))
    return body.startswith(start) and len(body) >= least
