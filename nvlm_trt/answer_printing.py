"""Prints the streamed answers of `nvlm-trt ask`, with log-probabilities and statistics."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from nvlm_trt.api import Answer, Delta, ScoredToken, Usage, merge_answers
from nvlm_trt.terminal import note, printable


def print_answers(stream: Iterable[Delta], n: int, stats: bool, as_json: bool) -> None:
    """Prints n answers to stdout as they arrive, or one JSON object at their end. Log-probabilities and `stats` go to
    stderr, so that stdout holds the answers alone."""
    started = time.perf_counter()
    ttft_s = None  # measured here, so the way to a server and back is included
    deltas, in_turn = [], _InTurn(n)
    for delta in stream:
        deltas.append(delta)
        if delta.token_ids and ttft_s is None:
            ttft_s = time.perf_counter() - started
        if not as_json:
            in_turn.write(delta)
    usage, answers = deltas[-1].usage if deltas else None, merge_answers(deltas)
    if as_json:
        print(json.dumps(_json(answers, usage, ttft_s), indent=2, allow_nan=False))
        return
    for answer in answers:
        for line in _logprob_lines(answer):
            note(line)
    if stats and usage is not None:
        note(f"[{' | '.join(_statistics(usage, ttft_s, len(answers)))}]")


class _InTurn:
    """Writes answers, whose deltas come mixed, one after the other: the first unfinished one as it comes, a later one
    when all before it have ended."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._current = 0
        self._held = [f"[{index + 1}/{n}] " if n > 1 else "" for index in range(n)]
        self._ended = [False] * n

    def write(self, delta: Delta) -> None:
        self._held[delta.index] += printable(delta.text)
        self._ended[delta.index] = delta.finish_reason is not None
        while self._current < self._n:
            sys.stdout.write(self._held[self._current])
            self._held[self._current] = ""
            if not self._ended[self._current]:
                break
            sys.stdout.write("\n")
            self._current += 1
        sys.stdout.flush()


def _json(answers: list[Answer], usage: Usage | None, ttft_s: float | None) -> dict[str, Any]:
    """Makes the object of one answer, or of several in a list `answers`."""
    of_request = {"usage": asdict(usage) if usage else None, "ttft_s": ttft_s}
    if len(answers) == 1:
        return {**_answer_json(answers[0]), **of_request}
    return {"answers": [_answer_json(answer) for answer in answers], **of_request}


def _answer_json(answer: Answer) -> dict[str, Any]:
    values: dict[str, Any] = {"text": answer.text, "token_ids": answer.token_ids, "finish_reason": answer.finish_reason}
    if answer.logprobs:
        values["logprobs"] = [item.to_dict() for item in answer.logprobs]
    return values


def _logprob_lines(answer: Answer) -> Iterator[str]:
    """Yields a line per token: its log-probability, its probability, and the most probable tokens in its place."""
    for item in answer.logprobs:
        others = ", ".join(f"{_quoted(token)} {math.exp(token.logprob):.1%}" for token in item.top)
        yield f"{_quoted(item):<16} {item.logprob:9.4f} {math.exp(item.logprob):6.1%}   most probable: {others}"


def _quoted(token: ScoredToken) -> str:
    """Returns the token's text in quotes, or its bytes where it is only a part of a character."""
    is_whole = not token.utf8 or token.text.encode() == token.utf8
    return repr(token.text) if is_whole else repr(token.utf8)


def _statistics(usage: Usage, ttft_s: float | None, answers: int) -> Iterator[str]:
    yield f"{usage.image_tiles} tiles{' from cache' if usage.cached_images else ''}"
    yield f"{usage.prompt_tokens} prompt tokens{f', {usage.cached_tokens} cached' if usage.cached_tokens else ''}"
    if usage.cross_tokens:
        yield f"{usage.cross_tokens} cross-attended"
    yield f"{usage.completion_tokens} tokens"
    if ttft_s is not None:
        yield f"first token after {ttft_s * 1e3:.0f} ms"
    # prefill makes the first token of each answer; the backend times the others, which may arrive here together
    decoded = usage.completion_tokens - answers
    if usage.ttft_s is not None and decoded > 0:
        yield f"{decoded / (usage.total_s - usage.ttft_s):.1f} tokens/s"
