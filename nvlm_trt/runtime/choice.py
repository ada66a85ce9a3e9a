"""Holds the state of one of the answers to a request: OpenAI's APIs call it a choice."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import TYPE_CHECKING

from nvlm_trt.api import Delta, FinishReason, ScoredToken, TokenLogprob, Usage
from nvlm_trt.backends.base import FloatArray
from nvlm_trt.prompt.detokenizer import IncrementalDecoder
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.drafting import Drafter
from nvlm_trt.runtime.sampling import Logprobs, Sampler
from nvlm_trt.runtime.text_stream import TextStream

if TYPE_CHECKING:
    from nvlm_trt.runtime.request import Request


class Choice:
    """Answer `index` of a request that has a slot. Only the thread of the text generator uses it."""

    def __init__(self, request: Request, index: int, placeholder_id: int, tokenizer: Tokenizer) -> None:
        """Start an answer to the request's prompt."""
        sampling = request.sampling
        assert (request.grammar is None) == (sampling.constraint is None), "its constraint was not compiled"
        self.request = request
        self.index = index
        self.slot = -1
        self.cached = 0  # tokens in the slot's KV cache, from the end of prefill on
        self.generated = 0
        self.finish_reason: FinishReason | None = None
        self._placeholder_id = placeholder_id
        self._tokenizer = tokenizer
        self._stop_ids: Collection[int] = () if sampling.ignore_eos else tokenizer.stop_ids
        self._text = TextStream(IncrementalDecoder(tokenizer), sampling.stop, sampling.min_tokens)
        self._grammar = request.grammar.start() if request.grammar else None
        self._drafter: Drafter | None = None  # from the first token on, if the request asks for drafts
        self.last_id = -1

    def next_token(self) -> tuple[int, int, tuple[int, int]]:
        """Count the last token as cached; return (its id, its position, its cross-attention range) for decoding."""
        self.cached += 1
        return self.last_id, self.cached - 1, self.request.prompt.decode_range

    def draft(self) -> list[int]:
        """Return the tokens that may follow the last one; none unless the request asks for drafts."""
        # the token behind the draft is part of the answer, too
        most = min(self.request.sampling.draft_tokens, self.request.max_tokens - self.generated - 1)
        return self._drafter.draft(most) if self._drafter and most > 0 else []

    def learn(self, drafted: int, accepted: int) -> None:
        """Note how many tokens of a draft were right."""
        assert self._drafter is not None
        self._drafter.learn(drafted, accepted)

    @functools.cached_property
    def _sampler(self) -> Sampler:
        # banned: the decoder would replace a placeholder in the answer by an image embedding
        banned_ids = {self._placeholder_id}
        request = self.request
        prompt_ids = request.prompt.input_ids
        return Sampler(request.sampling, prompt_ids, banned_ids, self._stop_ids, self.index, self._grammar)

    def accept(self, logits: FloatArray) -> Delta:
        """Draw the next token from logits [vocab]. Raises EngineError if they are not finite."""
        return self.accept_token(*self._sampler.sample(logits))

    def accept_token(self, token_id: int, logprobs: Logprobs | None) -> Delta:
        """Add a token that was drawn to the answer; `logprobs`: of this token, if the request asks for them."""
        if not self.generated:
            self.request.note_first_token()
            if most := self.request.sampling.draft_tokens:
                self._drafter = Drafter(self.request.prompt.input_ids.tolist(), most, self._placeholder_id)
        self.last_id = token_id
        self.generated += 1
        if self._drafter:
            self._drafter.add(token_id)
        text, finish_reason = self._advance_text(token_id)
        return Delta(
            text=text,
            token_ids=[token_id],
            logprobs=[self._in_words(logprobs)] if logprobs else [],
            finish_reason=finish_reason,
            usage=self._end(finish_reason) if finish_reason else None,
            index=self.index,
        )

    def end(self, finish_reason: FinishReason) -> Delta:
        """End the answer between two tokens; return its last delta."""
        text = "" if finish_reason == "cancelled" else self._text.flush()
        return Delta(text, [], finish_reason=finish_reason, usage=self._end(finish_reason), index=self.index)

    def _advance_text(self, token_id: int) -> tuple[str, FinishReason | None]:
        if token_id in self._stop_ids:
            return self._text.flush(), "stop"
        text = self._text.push(token_id)
        if self._text.stopped:
            return text, "stop"
        if self._grammar and self._grammar.is_complete:
            return text + self._text.flush(), "stop"
        if self.generated >= self.request.max_tokens:
            return text + self._text.flush(), "length"
        return text, None

    def _end(self, finish_reason: FinishReason) -> Usage | None:
        """Note the end of the answer; return the usage of the request if it has no other answer to finish."""
        self.finish_reason = finish_reason
        return None if self.request.unfinished else self.request.usage()

    def _in_words(self, logprobs: Logprobs) -> TokenLogprob:
        token_id, tokenizer = logprobs.token_id, self._tokenizer
        text, utf8 = tokenizer.token_text(token_id), tokenizer.token_bytes[token_id]
        top = (ScoredToken(i, p, tokenizer.token_text(i), tokenizer.token_bytes[i]) for i, p in logprobs.top)
        return TokenLogprob(token_id, logprobs.logprob, text, utf8, tuple(top))
