"""Drafts how an answer goes on, by looking its last tokens up in the prompt and in the answer."""

from __future__ import annotations

from collections.abc import Sequence

# Tokens that are looked up, the most that are found. Tokens of a few characters need many for a certain place.
_WORDS = (8, 5, 3)
_FIRST_LENGTH = 4  # tokens of the first draft
# In decoding steps of one answer. Checking S tokens takes about 1 + S / 6 of them (docs/onnxruntime.md, batch 1 and 8).
_COST, _COST_PER_TOKEN = 1.0, 1 / 6
_SLACK = 0.02  # of a step may be lost for each token
_FIRST_BALANCE, _MOST_BALANCE = 0.5, 4.0


class Drafter:
    """Drafts for one answer. Drafts become longer as long as they are right, and pause while they have cost more steps
    than they have saved: only the answer's own tokens decide about its drafts, so neighbours cannot change them."""

    def __init__(self, token_ids: Sequence[int], most: int, never: int) -> None:
        """Start behind the prompt `token_ids`. Drafts have at most `most` tokens, and end before a token `never`."""
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # tokens -> where the token stands that came after them last
        self._most, self._never = most, never
        self._length = min(_FIRST_LENGTH, most)
        self._balance = _FIRST_BALANCE
        for token_id in token_ids:
            self._append(token_id)

    def add(self, token_id: int) -> None:
        """Add a token of the answer."""
        self._append(token_id)
        self._balance = min(self._balance + _SLACK, _MOST_BALANCE)

    def draft(self, most: int) -> list[int]:
        """Return the tokens that may come next, at most `most`; often none."""
        found = (self._after.get(tuple(self._tokens[-size:])) for size in _WORDS)
        start = next((start for start in found if start is not None), None)
        if start is None or self._balance < 0:
            return []
        drafted: list[int] = []
        period = len(self._tokens) - start
        for index in range(min(most, self._length)):
            # beyond the last token, what the draft itself has begun goes on
            token_id = self._tokens[start + index] if index < period else drafted[index - period]
            if token_id == self._never:
                break
            drafted.append(token_id)
        return drafted

    def learn(self, drafted: int, accepted: int) -> None:
        """Note that `accepted` of `drafted` tokens were right. Checking them has also given the token behind them."""
        right = accepted == drafted
        self._length = min(2 * self._length, self._most) if right else min(accepted + 2, self._most)
        cost = _COST + _COST_PER_TOKEN * (drafted + 1)
        self._balance = min(self._balance + accepted + 1 - cost, _MOST_BALANCE)

    def _append(self, token_id: int) -> None:
        for size in _WORDS:
            if len(self._tokens) >= size:
                self._after[tuple(self._tokens[-size:])] = len(self._tokens)
        self._tokens.append(token_id)
