"""Writes text completions."""

from __future__ import annotations

from collections.abc import Sequence

from nvlm_trt.api import Answer, Delta, TokenLogprob
from nvlm_trt.serving.gateway.answer_format import Heading, Json, scored_tokens

_KIND = "text_completion"


class TextFormat:
    """Implements `AnswerFormat`."""

    def __init__(self, heading: Heading, alternatives: int | None) -> None:
        """`alternatives`: how many are listed beside each token; None: no log-probabilities."""
        self._heading = heading
        self._alternatives = alternatives
        self._offsets: dict[int, int] = {}  # characters of each answer up to now

    def opening(self, index: int) -> Json | None:
        return None

    def chunk(self, delta: Delta) -> Json:
        return self.envelope([self._choice(delta.index, delta.text, scored_tokens(delta), None)])

    def closing(self, delta: Delta) -> Json:
        return self.envelope([self._choice(delta.index, "", [], delta.finish_reason)])

    def envelope(self, choices: list[Json]) -> Json:
        return self._heading.of(_KIND, choices)

    def whole(self, answers: Sequence[Answer]) -> Json:
        return self.envelope(
            [
                self._choice(index, answer.text, scored_tokens(answer), answer.finish_reason)
                for index, answer in enumerate(answers)
            ]
        )

    def _choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob], finish_reason: str | None) -> Json:
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, logprobs),
            "finish_reason": finish_reason,
        }

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> Json | None:
        if self._alternatives is None:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._offsets.setdefault(index, 0))
            self._offsets[index] += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {other.text: other.logprob for other in token.top[: self._alternatives]} for token in tokens
            ],
            "text_offset": offsets,
        }
