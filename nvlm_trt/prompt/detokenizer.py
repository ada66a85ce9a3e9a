"""Turns token ids into text, one token at a time, in whole UTF-8 characters."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import tokenizers

from nvlm_trt.errors import ConfigError

if TYPE_CHECKING:
    from nvlm_trt.prompt.tokenizer import Tokenizer

_FALLBACK_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def byte_level_alphabet() -> dict[str, int]:
    """Map GPT-2's printable characters to the 256 byte values. Qwen2's vocabulary spells its tokens with them.

    A printable Latin-1 character is its own byte; the other bytes, in order, have the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class TokenBytes:
    """Maps a token id to the bytes of its text: b"" for special tokens and for ids outside the vocabulary.

    Supports the tokenizers of the two LLM families: byte-level BPE (Qwen2, Llama 3) and SentencePiece BPE with byte
    fallback (Llama 2, Yi). Raises ConfigError for another decoder.
    """

    def __init__(self, raw: tokenizers.Tokenizer) -> None:
        self._raw = raw
        self._added = {
            token_id: b"" if token.special else token.content.encode()
            for token_id, token in raw.get_added_tokens_decoder().items()
        }
        decoders = _flatten(json.loads(raw.decoder.__getstate__()) if raw.decoder else {})
        kinds = {decoder.get("type") for decoder in decoders}
        self._byte_level = "ByteLevel" in kinds
        self._alphabet = byte_level_alphabet()
        if not self._byte_level and "ByteFallback" not in kinds:
            named = ", ".join(sorted(map(str, kinds))) or "none"
            raise ConfigError(f"tokenizer.json: decoder {named} is not supported; ByteLevel and ByteFallback are")
        # SentencePiece puts a space before the first word of a text, and its decoder removes the space
        self.strips_first_space = "Strip" in kinds

    def __getitem__(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        token = self._raw.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        if self._byte_level:
            if all(character in self._alphabet for character in token):
                return bytes(self._alphabet[character] for character in token)
            return token.encode()
        if byte := _FALLBACK_BYTE.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


class IncrementalDecoder:
    """Decodes a growing token sequence. The results of all pushes and of the flush join to `Tokenizer.decode`.

    A character whose bytes are spread over tokens is held back until it is whole. Bytes that cannot become a character
    are decoded as U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = True

    def push(self, token_id: int) -> str:
        """Return the characters that this token completes: often one word, sometimes ""."""
        return self._decode(self._token_bytes[token_id])

    def extend(self, token_ids: Iterable[int]) -> str:
        """Push several tokens at once."""
        return self._decode(b"".join(self._token_bytes[token_id] for token_id in token_ids))

    def flush(self) -> str:
        """End the sequence: return U+FFFD if it stops inside a character, else ""."""
        return self._utf8.decode(b"", final=True)

    def _decode(self, data: bytes) -> str:
        if self._at_start and data:
            self._at_start = False
            if self._token_bytes.strips_first_space:
                data = data.removeprefix(b" ")
        return self._utf8.decode(data)


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder.get("type") == "Sequence":
        return [inner for part in decoder["decoders"] for inner in _flatten(part)]
    return [decoder] if decoder else []
