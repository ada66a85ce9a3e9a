"""Builds a sequence of token ids, each with the range of cross-attended tokens that it reads."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nvlm_trt.prompt.tokenizer import Tokenizer

Range = tuple[int, int]
Tokenised = tuple[list[int], list[tuple[int, int]]]  # ids, and the (start, end) of each id's characters


class TokenSequence:
    """Collects text and control tokens. Text between two control tokens is encoded as one string, because merges
    cross the borders of its parts: Qwen2 has a token `><`, which `<Image><tile_1>` uses.

    The tokens of a part read the range `reads`, by default (0, `seen`). A token that several parts share belongs to the
    part of its last character.
    """

    def __init__(self, tokenizer: Tokenizer, tokenised: dict[str, Tokenised] | None = None) -> None:
        """Start an empty sequence. `tokenised` caches the tokens of each stretch of text, for other sequences too."""
        self.seen = 0  # cross-attended tokens of all images that are complete
        self._tokenizer = tokenizer
        self._tokenised = {} if tokenised is None else tokenised
        self._ids: list[int] = []
        self._ranges: list[Range] = []
        self._parts: list[tuple[str, Range]] = []  # text not yet encoded

    def add_text(self, text: str, reads: Range | None = None) -> None:
        self._parts.append((text, reads or (0, self.seen)))

    def add_markup(self, name: str, reads: Range | None = None) -> None:
        """Add a control token or tag: by its id if the tokenizer has one, else as text."""
        token_id = self._tokenizer.token_id(name)
        if token_id is None:
            self.add_text(name, reads)
        else:
            self.add_tokens(token_id, 1, reads)

    def add_tokens(self, token_id: int, count: int, reads: Range | None = None) -> None:
        self._encode_parts()
        self._ids.extend([token_id] * count)
        self._ranges.extend([reads or (0, self.seen)] * count)

    def finish(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Return ids [S] and ranges [S, 2]."""
        self._encode_parts()
        return np.array(self._ids, np.int64), np.array(self._ranges, np.int32).reshape(-1, 2)

    def _encode_parts(self) -> None:
        if not self._parts:
            return
        texts, ranges = zip(*self._parts, strict=True)
        self._parts = []
        text = "".join(texts)
        if text not in self._tokenised:
            self._tokenised[text] = self._tokenizer.encode_with_offsets(text)
        ids, offsets = self._tokenised[text]
        if not ids:
            return
        last_characters = np.array([max(end - 1, 0) for _, end in offsets])
        part_ends = np.cumsum([len(text) for text in texts])
        # the owner of a token is the first part that ends after the token's last character
        owners = np.searchsorted(part_ends, last_characters, side="right")
        self._ids.extend(ids)
        self._ranges.extend(ranges[owner] for owner in owners)
