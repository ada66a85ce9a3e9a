"""Compares every answer of the soak with the first answer to the same question."""

from __future__ import annotations

import threading
from collections.abc import Sequence


class FirstAnswers:
    """Keeps the longest answer seen to each question. Thread-safe.

    Of a request whose client left, the answer is the beginning of another's."""

    def __init__(self) -> None:
        self._answers: dict[str, tuple[int, ...]] = {}
        self._lock = threading.Lock()

    def difference(self, key: str, tokens: Sequence[int], whole: bool) -> str:
        """Returns how an answer differs from the earlier ones, or nothing. `whole`: the answer ended by itself."""
        found = tuple(tokens)
        with self._lock:
            known = self._answers.get(key)
            if known is None:
                self._answers[key] = found
                return ""
            shared = min(len(known), len(found))
            if known[:shared] == found[:shared] and not (whole and len(known) != len(found)):
                if len(found) > len(known):
                    self._answers[key] = found
                return ""
        at = next((i for i in range(shared) if known[i] != found[i]), shared)
        return f"{key[:40]}: token {at} of {len(found)} differs from the first answer of {len(known)}"
