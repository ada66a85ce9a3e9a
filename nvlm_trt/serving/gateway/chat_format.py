"""Writes chat completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nvlm_trt.api import Answer, Delta, ScoredToken, TokenLogprob
from nvlm_trt.serving.gateway.answer_format import Heading, Json, scored_tokens

_WHOLE = "chat.completion"
_CHUNK = "chat.completion.chunk"


class ChatFormat:
    """Implements `AnswerFormat`."""

    def __init__(self, heading: Heading, alternatives: int | None) -> None:
        """`alternatives`: how many are listed beside each token; None: no log-probabilities."""
        self._heading = heading
        self._alternatives = alternatives

    def opening(self, index: int) -> Json | None:
        return self.envelope([_choice(index, {"role": "assistant", "content": ""}, None, None)])

    def chunk(self, delta: Delta) -> Json:
        logprobs = self._logprobs(scored_tokens(delta))
        return self.envelope([_choice(delta.index, {"content": delta.text}, logprobs, None)])

    def closing(self, delta: Delta) -> Json:
        return self.envelope([_choice(delta.index, {}, None, delta.finish_reason)])

    def envelope(self, choices: list[Json]) -> Json:
        return self._heading.of(_CHUNK, choices)

    def whole(self, answers: Sequence[Answer]) -> Json:
        choices: list[Json] = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._logprobs(scored_tokens(answer)),
                "finish_reason": answer.finish_reason,
            }
            for index, answer in enumerate(answers)
        ]
        return self._heading.of(_WHOLE, choices)

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> Json | None:
        if self._alternatives is None:
            return None
        return {
            "content": [
                {**_token(token), "top_logprobs": [_token(other) for other in token.top[: self._alternatives]]}
                for token in tokens
            ],
            "refusal": None,
        }


def _choice(index: int, delta: Json, logprobs: Json | None, finish_reason: str | None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _token(token: ScoredToken) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.utf8)}
