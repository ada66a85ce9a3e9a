"""Turns tokens into the text that a client sees: whole characters only, and no part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """Turns ids into text as they come, e.g. tokenizer.IncrementalDecoder."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class TextStream:
    """Produces the text of one answer, which ends before the stop string that is completed first.

    A stop string may begin and end inside tokens. Text is held back while it may be the beginning of a stop string.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        """Start an answer. A stop string that one of the first `min_tokens` tokens completes is ordinary text."""
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._unstoppable = min_tokens  # tokens
        self._held = ""
        self.stopped = False  # a stop string was found: nothing follows

    def push(self, token_id: int) -> str:
        """Return the text that can be shown now, often empty."""
        if self.stopped:
            return ""
        self._take(self._detokenizer.push(token_id))
        self._unstoppable -= 1
        return self._release(self._possible_stop())

    def flush(self) -> str:
        """Return the rest of the text. No token may follow."""
        if self.stopped:
            return ""
        self._take(self._detokenizer.flush())
        return self._release(0)

    def _take(self, text: str) -> None:
        before = len(self._held)
        self._held += text
        if self._unstoppable > 0:
            return
        # only where the new text completes it: the held text may have one that was ordinary text
        ends = [(stop, max(0, before + 1 - len(stop))) for stop in self._stop]
        found = [(start + len(stop), start) for stop, first in ends if (start := self._held.find(stop, first)) >= 0]
        if found:
            _, start = min(found)
            self._held = self._held[:start]
            self.stopped = True

    def _possible_stop(self) -> int:
        """Count the characters at the end of the held text that may be the beginning of a stop string."""
        if self.stopped:
            return 0
        longest = min(max(map(len, self._stop), default=1) - 1, len(self._held))
        for size in range(longest, 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0

    def _release(self, keep: int) -> str:
        border = len(self._held) - keep
        text, self._held = self._held[:border], self._held[border:]
        return text
