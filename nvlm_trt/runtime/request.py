"""Holds the state of one request, from submission to its last delta."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from nvlm_trt.api import Delta, FinishReason, SamplingParams, Usage
from nvlm_trt.backends.base import ImageFeatures, IntArray, RangeArray
from nvlm_trt.limits import EngineLimits, check_embeddings
from nvlm_trt.prompt.encoder import EncodedPrompt
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.choice import Choice
from nvlm_trt.runtime.grammar import Grammar
from nvlm_trt.runtime.prompt_key import PromptKey, prompt_key
from nvlm_trt.runtime.sampling import Logprobs

OnDelta = Callable[[Delta], None]
OnError = Callable[[Exception], None]


class State(Enum):
    ENCODING = "its images are being encoded"
    READY = "it waits for a slot"
    PREFILLING = "its prompt is being cached"
    DECODING = "it generates"
    ENDED = "its last delta or its error was delivered"


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of a prompt, and the range of image embeddings that replace their placeholders."""

    position: int
    input_ids: IntArray  # [S]
    first_embedding: int
    last_embedding: int  # exclusive
    cross_ranges: RangeArray  # [S, 2]


class Request:
    """One request, for one answer or several. An encoder's thread calls `provide` or `fail`, and any thread may call
    `cancel`. Only the thread of the text generator that the request was submitted to uses everything else."""

    def __init__(
        self, sampling: SamplingParams, on_delta: OnDelta, on_error: OnError, request_id: str | None = None
    ) -> None:
        """Make a request that is not submitted yet. `on_delta` is called with each delta until every answer has had one
        with a finish_reason; after an error, `on_error` is the last call instead. Both must be quick. `request_id`
        names the request in the log."""
        self.request_id = request_id
        self.sampling = sampling
        self.on_delta, self.on_error = on_delta, on_error
        self.state = State.ENCODING
        self.arrived = 0  # on the clock of the text generator
        self.failure: Exception | None = None  # why the images could not be encoded
        self.slot = -1  # while its prompt is prefilled
        self.cached = 0  # tokens of the prompt in the KV cache
        self.reused = 0  # of these, tokens that an earlier request has left
        self.choices: Sequence[Choice] = ()  # its n answers, once it has slots
        self.prompt: EncodedPrompt  # set when the state becomes READY
        self.images: Sequence[ImageFeatures] = ()
        self.grammar: Grammar | None = None  # of sampling.constraint; set before the state becomes READY
        self.max_tokens: int  # of each answer in this engine; set when the request is admitted
        self._image_keys: Sequence[str | None] = ()
        self._key: PromptKey | None = None
        self._cached_images = 0
        self._encode_s = 0.0
        self._ending = threading.Lock()  # a request may end while another thread provides its images
        self._cancelled = threading.Event()
        self._wake: Callable[[], None] = lambda: None
        self._submitted = time.monotonic()
        self._first_token: float | None = None

    # --- any thread --------------------------------------------------------------------------------------------------

    def provide(
        self,
        prompt: EncodedPrompt,
        images: Sequence[ImageFeatures] = (),
        cached_images: int = 0,
        encode_s: float = 0.0,
        image_keys: Sequence[str | None] | None = None,
    ) -> None:
        """Set the prompt and the features of its images, in order; `cached_images` of them are from the image cache.
        Images with equal `image_keys` are equal; an image whose key is None is unlike any other."""
        with self._ending:
            if self.state is not State.ENCODING:
                return
            self.prompt, self.images = prompt, images
            self._image_keys = [None] * len(images) if image_keys is None else image_keys
            self._cached_images, self._encode_s = cached_images, encode_s
            self.state = State.READY
        self._wake()

    def fail(self, error: Exception) -> None:
        """Note that the images cannot be encoded."""
        self.failure = error
        self._wake()

    def cancel(self) -> None:
        """End the request within one step. The answers that have not ended before end with the finish_reason
        "cancelled"."""
        self._cancelled.set()
        self._wake()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def is_over(self) -> bool:
        """Return whether the request no longer needs its images."""
        return self.cancelled or self.state is State.ENDED

    @property
    def needs_a_step(self) -> bool:
        """Return whether the text generator has something to do with this request, which waits for a slot."""
        return self.state is State.READY or self.cancelled or self.failure is not None

    # --- the text generator ------------------------------------------------------------------------------------------

    def submitted_to(self, wake: Callable[[], None]) -> None:
        """Note the time of submission, and `wake`: it is called whenever another thread changes the request."""
        self._submitted = time.monotonic()
        self._wake = wake

    @property
    def is_prefilled(self) -> bool:
        return self.cached >= len(self.prompt.input_ids)

    def admit(self, limits: EngineLimits, placeholder_id: int, tokenizer: Tokenizer) -> None:
        """Prepare to generate. Raises RequestError for a prompt that exceeds a limit of the engine."""
        prompt, sampling = self.prompt, self.sampling
        limits.check_prompt(len(prompt.input_ids), prompt.placeholders)
        check_embeddings(prompt.placeholders, sum(len(image.embeddings) for image in self.images))
        self._placeholder_id = placeholder_id
        self._embeddings_used = 0
        self.max_tokens = min(sampling.max_tokens, limits.max_seq_len - len(prompt.input_ids))
        self.choices = [Choice(self, index, placeholder_id, tokenizer) for index in range(sampling.n)]
        self._admitted = time.monotonic()
        self.state = State.PREFILLING

    def key(self, placeholder_id: int, chunk_size: int) -> PromptKey:
        """Return what tells which chunks of the prompt other prompts share; both arguments are always the same."""
        if self._key is None:
            self._key = prompt_key(self.prompt, self.images, self._image_keys, placeholder_id, chunk_size)
        return self._key

    def skip(self, tokens: int) -> None:
        """Count the first `tokens` tokens of the prompt as cached: an earlier request has left them."""
        self.cached = self.reused = tokens
        self._embeddings_used = int(np.count_nonzero(self.prompt.input_ids[:tokens] == self._placeholder_id))

    def next_chunk(self, size: int) -> Chunk:
        """Return the next `size` tokens of the prompt, or the rest, and count them as cached."""
        start, first = self.cached, self._embeddings_used
        input_ids = self.prompt.input_ids[start : start + size]
        self._embeddings_used += int(np.count_nonzero(input_ids == self._placeholder_id))
        self.cached += len(input_ids)
        ranges = self.prompt.cross_ranges[start : start + size]
        return Chunk(start, input_ids, first, self._embeddings_used, ranges)

    def note_first_token(self) -> None:
        """Note that the first token of an answer was drawn."""
        self._first_token = self._first_token or time.monotonic()

    @property
    def unfinished(self) -> list[Choice]:
        return [choice for choice in self.choices if choice.finish_reason is None]

    def accept_token(self, token_id: int, logprobs: Logprobs | None, index: int = 0) -> Delta:
        """Add a token that was drawn elsewhere to answer `index`; `logprobs`: of this token, if they are asked for."""
        return self.choices[index].accept_token(token_id, logprobs)

    def delta_without_token(self, finish_reason: FinishReason, index: int = 0) -> Delta:
        """End answer `index` between two tokens; return its last delta."""
        return self.choices[index].end(finish_reason)

    def cancelled_deltas(self) -> list[Delta]:
        """End the answers of a cancelled request that have not ended; return their last deltas."""
        if not self.choices:
            return [Delta("", [], finish_reason="cancelled", index=index) for index in range(self.sampling.n)]
        return [choice.end("cancelled") for choice in self.unfinished]

    def end(self) -> None:
        """End the request: no delta and no error follows."""
        with self._ending:
            self.state = State.ENDED
        # They refer to the request. Such a cycle would keep its images in memory until Python looks for cycles.
        self.choices = ()

    def usage(self) -> Usage:
        """Return the tokens and times of the request up to now."""
        return Usage(
            prompt_tokens=len(self.prompt.input_ids),
            completion_tokens=sum(choice.generated for choice in self.choices),
            image_tiles=sum(image.tiles for image in self.images),
            cross_tokens=self.prompt.cross_tokens,
            cached_images=self._cached_images,
            encode_s=self._encode_s,
            queue_s=self._admitted - self._submitted,
            ttft_s=self._first_token - self._submitted if self._first_token else None,
            total_s=time.monotonic() - self._submitted,
            image_tokens=self.prompt.placeholders,
            cached_tokens=self.reused,
        )
