"""Tells by the first bytes of a file what was sent in place of an image that can be read, and what to do about it."""

from __future__ import annotations

import re
from typing import NamedTuple


class Foreign(NamedTuple):
    """A kind of file that is not read."""

    name: str  # with its article
    remedy: str


_CONVERT = "convert it to PNG or JPEG"
_FRAME = "save one of its frames as PNG or JPEG"
_PAGE = "save the page as PNG or JPEG"
_UNPACK = "unpack it, and name an image in it"

_HEAD = 1024
# a comment in an image may hold the signature of another format
_READABLE = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP|BM|P[1-7fFyY0]\s|(II\*\0|MM\0\*)(?!.{4}CR\x02)|II\+\0",
    re.DOTALL,
)
_MAGIC: tuple[tuple[int, bytes, str, str], ...] = (  # offset, bytes, what it is, what to do
    (0, b"\x00\x00\x00\x0cJXL \r\n\x87\n", "a JPEG XL image", _CONVERT),
    (0, b"\xff\x0a", "a JPEG XL image", _CONVERT),
    (0, b"\x00\x00\x00\x0cjP  \r\n\x87\n", "a JPEG 2000 image", _CONVERT),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 image", _CONVERT),
    (0, b"II\xbc", "a JPEG XR image", _CONVERT),
    (0, b"\x8aMNG", "an MNG animation", _FRAME),
    (0, b"\x89PNG\n\x1a\n", "a PNG damaged by a transfer in text mode", "copy it again in binary mode"),
    (0, b"\xef\xbf\xbdPNG", "a PNG damaged by a conversion to UTF-8", "copy it again as bytes"),
    (0, b"8BPS", "a Photoshop document", _CONVERT),
    (0, b"gimp xcf", "a GIMP document", _CONVERT),
    (0, b"\x00\x00\x01\x00", "a Windows icon", _CONVERT),
    (0, b"\x00\x00\x02\x00", "a Windows cursor or a TGA image", _CONVERT),
    (0, b"icns", "an Apple icon", _CONVERT),
    (0, b"DDS ", "a DDS texture", _CONVERT),
    (0, b"qoif", "a QOI image", _CONVERT),
    (0, b"BPG\xfb", "a BPG image", _CONVERT),
    (0, b"\x76\x2f\x31\x01", "an OpenEXR image", _CONVERT),
    (0, b"#?R", "a Radiance HDR image", _CONVERT),
    (0, b"SIMPLE  =", "a FITS image", _CONVERT),
    (128, b"DICM", "a DICOM image", _CONVERT),
    (0, b"\xd7\xcd\xc6\x9a", "a Windows metafile", _CONVERT),
    (40, b" EMF", "a Windows metafile", _CONVERT),
    (0, b"MM\x00+", "a big-endian BigTIFF", _CONVERT),
    (8, b"CR\x02", "a camera's raw photograph", _CONVERT),
    (0, b"FUJIFILMCCD-RAW", "a camera's raw photograph", _CONVERT),
    (0, b"IIRO", "a camera's raw photograph", _CONVERT),
    (0, b"IIU\x00", "a camera's raw photograph", _CONVERT),
    (0, b"%!PS", "a PostScript document", _PAGE),
    (0, b"\xc5\xd0\xd3\xc6", "a PostScript document", _PAGE),
    (0, b"\xd0\xcf\x11\xe0", "an Office document", _PAGE),
    (0, b"PK\x03\x04", "a ZIP archive or an Office document", _UNPACK),
    (0, b"\x1f\x8b", "a gzip archive", _UNPACK),
    (0, b"BZh", "a bzip2 archive", _UNPACK),
    (0, b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (0, b"Rar!", "a RAR archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"\x93NUMPY", "a NumPy array", "save it as PNG"),
    (0, b"FLV\x01", "an FLV video", _FRAME),
    (0, b"OggS", "an Ogg video or audio file", _FRAME),
    (0, b"\x00\x00\x01\xba", "an MPEG video", _FRAME),
    (0, b"\x00\x00\x01\xb3", "an MPEG video", _FRAME),
    (4, b"moov", "a QuickTime video", _FRAME),
    (4, b"mdat", "a QuickTime video", _FRAME),
    (8, b"AVI ", "an AVI video", _FRAME),
)
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_AVIF = {b"avif", b"avis"}

# a comment's end is looked for once: a pattern that may skip it takes a time exponential in the number of comments
_PROLOGUE = rb"(<\?xml[^>]*>\s*|<!--((?!-->).)*-->\s*|<!doctype svg[^>]*>\s*)*"
_TEXTS: tuple[tuple[bytes, str, str], ...] = (  # start of a text in lower case, what it is, what to do
    (rb"version https://git-lfs\.github\.com/", "a Git LFS pointer", "fetch the image with `git lfs pull`"),
    (
        rb"(\.\./)*(\.git/)?annex/objects/|/annex/objects/",
        "a git-annex pointer",
        "fetch the image with `git annex get`",
    ),
    (_PROLOGUE + rb"<svg", "an SVG drawing", "render it as PNG"),
    (
        _PROLOGUE + rb"<(!doctype html|html|head|body)",
        "an HTML page",
        "download the image itself, not the page that shows it",
    ),
    (rb"<\?xml", "an XML document", "download the image itself"),
    (rb"data:image/", "a data URL", "decode its base64 and send the bytes"),
    (rb"(ivborw0kggo|/9j/|r0lgod|uklgr)[a-z0-9+/=_\s-]*$", "an image in base64", "decode it and send the bytes"),
    (rb"https?://\S+\s*$", "a link", "download the image it names"),
    (rb'[\[{]\s*["\]}{]', "a JSON document", "look in it for an error of the download"),
)


def foreign_format(data: bytes) -> Foreign | None:
    """Names a file that no version of this package reads. None for an image format that is read, and for an unknown
    one."""
    head = data[:_HEAD]
    if _READABLE.match(head):
        return None
    if head[4:8] == b"ftyp":
        return _iso_media(head)
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return Foreign("a WebM video" if b"webm" in head[:64] else "a Matroska video", _FRAME)
    for offset, magic, name, remedy in _MAGIC:
        if head.startswith(magic, offset):
            return Foreign(name, remedy)
    if b"%PDF-" in head:
        return Foreign("a PDF document", _PAGE)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for pattern, name, remedy in _TEXTS:
        if re.match(pattern, text, re.DOTALL):
            return Foreign(name, remedy)
    if data and not data.strip(b"\0"):
        return Foreign(f"{len(data)} zero bytes", "copy the image again")
    return None


def is_avif(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and bool(_brands(data[:_HEAD]) & _AVIF)


def _iso_media(head: bytes) -> Foreign | None:
    brands = _brands(head)
    if brands & _AVIF:
        return None
    if brands & _HEIC:
        return Foreign("a HEIC image", _CONVERT)
    if brands & {b"mif1", b"msf1"}:
        return Foreign("a HEIF image", _CONVERT)
    if b"crx " in brands:
        return Foreign("a camera's raw photograph", _CONVERT)
    if head[8:11] == b"M4A":
        return Foreign("an audio file", "name an image")
    return Foreign("a QuickTime video" if head[8:12] == b"qt  " else "an MP4 video", _FRAME)


def _brands(head: bytes) -> set[bytes]:
    """Returns the major and the compatible brands of an ISO media file."""
    end = int.from_bytes(head[:4], "big")
    return {head[8:12]} | {head[at : at + 4] for at in range(16, min(end, len(head)) - 3, 4)}
