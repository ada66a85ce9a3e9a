"""Makes texts of every script, and texts that are none."""

from __future__ import annotations

import random

_RANGES = {
    "ascii": (0x20, 0x7E),
    "latin": (0xC0, 0x24F),
    "greek": (0x391, 0x3C9),
    "cyrillic": (0x400, 0x45F),
    "hebrew": (0x5D0, 0x5EA),
    "arabic": (0x621, 0x64A),
    "devanagari": (0x905, 0x94D),
    "thai": (0xE01, 0xE3A),
    "kana": (0x3041, 0x30FF),
    "han": (0x4E00, 0x9FA5),
    "hangul": (0xAC00, 0xD7A3),
    "emoji": (0x1F300, 0x1FAFF),
    "old italic": (0x10300, 0x1031F),
    "marks": (0x300, 0x36F),
    "control": (0x00, 0x1F),
    "more control": (0x7F, 0x9F),
    "direction": (0x200B, 0x202E),
    "private": (0xE000, 0xE0FF),
    "tags": (0xE0000, 0xE007F),
    "noncharacters": (0xFFFE, 0xFFFF),
    "any": (0x20, 0x10FFFF),
}
_SURROGATES = (0xD800, 0xDFFF)
_MARKUP = (
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "\\<image>",
    "<tile_1>",
    "<tile_global_thumbnail>",
    "</s>",
    "<|endoftext|>",
    "system\n",
    "👨‍👩‍👧‍👦",
    "\u202eabc\u202c",
    "a\u0301" * 20,
    "\r\n\r\n",
    "\0",
    "{{}}",
    "%s%n",
    "../../etc/passwd",
    "'; --",
)


def text(source: random.Random, longest: int = 200) -> str:
    """Mixes some scripts and markup. Can be encoded as UTF-8; may be empty."""
    pieces = []
    for _ in range(source.randrange(6)):
        if source.random() < 0.3:
            pieces.append(source.choice(_MARKUP))
            continue
        first, last = _RANGES[source.choice(tuple(_RANGES))]
        length = source.randrange(1, max(2, longest // 6))
        pieces.append("".join(chr(_scalar(source.randint(first, last))) for _ in range(length)))
    return "".join(pieces)


def plain(source: random.Random) -> str:
    """Makes a short text that every server has to answer."""
    words = ("What", "is", "the", "total", "von", "Größe", "答え", "сумма", "المجموع", "🙂")
    return " ".join(source.choice(words) for _ in range(source.randrange(1, 12)))


def broken(source: random.Random) -> str:
    """Makes a text with half a surrogate pair, which no UTF-8 holds."""
    whole = text(source)
    at = source.randrange(len(whole) + 1)
    return whole[:at] + chr(source.randint(*_SURROGATES)) + whole[at:]


def _scalar(point: int) -> int:
    return 0xFFFD if _SURROGATES[0] <= point <= _SURROGATES[1] else point
