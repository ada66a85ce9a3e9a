"""Damages files: single bytes, lengths, chunks, nesting, and splices of two files."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Sequence

MOST_BYTES = 1 << 20  # of a damaged file
_PNG_START = 8
_EXTREME = (0, 1, 2, 3, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_TYPES = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"acTL", b"fcTL", b"fdAT")

Mutation = Callable[[random.Random, bytes, bytes], bytes]  # (random numbers, file, another file) -> file


def mutate(source: random.Random, data: bytes, other: bytes) -> tuple[bytes, list[str]]:
    """Applies one to four mutations. Returns the file and their names."""
    names = []
    for _ in range(source.choice((1, 1, 1, 2, 2, 3, 4))):
        mutation = source.choice(MUTATIONS)
        names.append(mutation.__name__.lstrip("_"))
        data = mutation(source, data, other)[:MOST_BYTES] or data
    return data, names


def _bits(source: random.Random, data: bytes, other: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(source.choice((1, 1, 2, 8, 32))):
        changed[source.randrange(len(changed))] ^= 1 << source.randrange(8)
    return bytes(changed)


def _bytes(source: random.Random, data: bytes, other: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(source.choice((1, 2, 4, 16))):
        changed[_place(source, data)] = source.choice((0, 0xFF, source.randrange(256)))
    return bytes(changed)


def _number(source: random.Random, data: bytes, other: bytes) -> bytes:
    """Writes an extreme number over a length, an offset or a size, in either byte order."""
    layout = source.choice((">H", "<H", ">I", "<I", ">Q", "<Q"))
    size = struct.calcsize(layout)
    if len(data) <= size:
        return data
    at = _place(source, data[:-size])
    value = source.choice((*_EXTREME, len(data), at, source.getrandbits(32))) % (1 << (8 * size))
    return data[:at] + struct.pack(layout, value) + data[at + size :]


def _truncation(source: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: source.randrange(len(data))]


def _removal(source: random.Random, data: bytes, other: bytes) -> bytes:
    begin, end = _range(source, data)
    return data[:begin] + data[end:]


def _insertion(source: random.Random, data: bytes, other: bytes) -> bytes:
    at = _place(source, data)
    filling = source.choice((source.randbytes(source.randrange(1, 64)), bytes(source.choice((1, 100, 10_000)))))
    return data[:at] + filling + data[at:]


def _duplication(source: random.Random, data: bytes, other: bytes) -> bytes:
    begin, end = _range(source, data)
    return data[:end] + data[begin:end] * source.choice((1, 1, 2, 10)) + data[end:]


def _nesting(source: random.Random, data: bytes, other: bytes) -> bytes:
    """Repeats a part hundreds of times: frames, directories and chunks in a long row."""
    begin, end = _range(source, data[:4096])
    return data[:end] + data[begin:end] * source.choice((200, 1000, 5000)) + data[end:]


def _exchange(source: random.Random, data: bytes, other: bytes) -> bytes:
    begin, end = _range(source, data)
    to = _place(source, data)
    rest = data[:begin] + data[end:]
    return rest[:to] + data[begin:end] + rest[to:]


def _splice(source: random.Random, data: bytes, other: bytes) -> bytes:
    """Joins the head of one file to the tail of another."""
    return data[: source.randrange(len(data))] + other[source.randrange(len(other)) :]


def _envelope(source: random.Random, data: bytes, other: bytes) -> bytes:
    """Puts one file into another."""
    at = _place(source, data)
    return data[:at] + other + data[at:]


def _tail(source: random.Random, data: bytes, other: bytes) -> bytes:
    return data + source.choice((bytes(1000), source.randbytes(100), other, data))


def _png_chunk(source: random.Random, data: bytes, other: bytes) -> bytes:
    """Changes a chunk of a PNG and corrects its checksum, so that a parser reads on."""
    chunks = _chunks(data)
    if not chunks:
        return _number(source, data, other)
    index = source.randrange(len(chunks))
    kind, content = chunks[index]
    action = source.randrange(5)
    if action == 0 and content:
        chunks[index] = (kind, _number(source, content + bytes(8), other))
    elif action == 1:
        chunks[index] = (source.choice(_TYPES), content)
    elif action == 2:
        chunks.insert(index, (kind, content))
    elif action == 3:
        chunks[index] = (kind, _bits(source, content or b"\0", other))
    else:
        text = zlib.compress(bytes(source.choice((10, 1 << 20, 1 << 24))), 9)
        chunks.insert(index, source.choice(((b"zTXt", b"a\0\0" + text), (b"iCCP", b"a\0\0" + text), (b"IDAT", text))))
    return data[:_PNG_START] + b"".join(png_chunk(*chunk) for chunk in chunks)


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Reads the chunks of a PNG; none for another file."""
    chunks: list[tuple[bytes, bytes]] = []
    at = _PNG_START if data.startswith(b"\x89PNG") else len(data)
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """Writes a chunk with its length and checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _place(source: random.Random, data: bytes) -> int:
    """Chooses a position, more often within the header."""
    return source.randrange(min(len(data), 128) if source.random() < 0.6 else len(data)) if data else 0


def _range(source: random.Random, data: bytes) -> tuple[int, int]:
    begin = _place(source, data)
    return begin, min(len(data), begin + source.choice((1, 4, 12, 64, 512)))


MUTATIONS: Sequence[Mutation] = (
    _bits,
    _bytes,
    _bytes,
    _number,
    _number,
    _number,
    _truncation,
    _removal,
    _insertion,
    _duplication,
    _nesting,
    _exchange,
    _splice,
    _envelope,
    _tail,
    _png_chunk,
    _png_chunk,
)
