"""What goes into the batcher and what comes out: a request with its features, deltas, usage, a handle to cancel."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.errors import EngineError
from nvlm_trt.prompt.encoder import EncodedPrompt
from nvlm_trt.runtime.sampling import SamplingParams, TokenLogprob

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class ImageFeatures:
    """What the decoder needs of one image, ready to be copied into a slot. Shared between requests: read-only."""

    llm_tokens: FloatArray  # [m, hidden], replace the image tokens of the prompt
    cross_kv: FloatArray | None  # [cross layers, 2, kv_heads, C, head_dim]; None: nothing to cross-attend
    tiles: int  # thumbnail included

    def __post_init__(self) -> None:
        for array in (self.llm_tokens, self.cross_kv):
            if array is not None:
                array.flags.writeable = False

    @property
    def nbytes(self) -> int:
        return self.llm_tokens.nbytes + (0 if self.cross_kv is None else self.cross_kv.nbytes)


@dataclass(frozen=True)
class GenerationRequest:
    """A request whose images are encoded."""

    prompt: EncodedPrompt
    sampling: SamplingParams
    images: Sequence[ImageFeatures] = ()  # in the order of the prompt
    decode_range: tuple[int, int] = (0, 0)  # what generated tokens cross-attend
    cached_images: int = 0
    encode_s: float = 0.0

    def llm_image_tokens(self, hidden: int) -> FloatArray:
        """The tokens [M, hidden] of all images that join the LLM's sequence."""
        return np.concatenate([np.empty((0, hidden), np.float32), *(image.llm_tokens for image in self.images)])


@dataclass(frozen=True)
class Usage:
    """What a request took. Times are seconds; those that start with submission include waiting."""

    prompt_tokens: int  # in the LLM's sequence, image tokens included
    completion_tokens: int
    image_tiles: int
    cross_tokens: int  # image tokens (and tags, NVLM-H) that are cross-attended
    cached_images: int  # images whose features were in the cache
    encode_s: float  # tiling, encoding and cross-attention keys and values of the images
    queue_s: float  # from submission until a slot was given, encoding included
    ttft_s: float | None  # from submission to the first token; None: there was none
    total_s: float  # from submission to the end


@dataclass(frozen=True)
class Delta:
    """One step of an answer: a token, and the text that it completes (often none).

    The last delta has a finish_reason: "stop" (end-of-text token or stop string), "length" (max_tokens or the
    engine's max_seq_len) or "cancelled" (without a token). The end-of-text token is reported, its text is empty.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] = field(default_factory=list)  # one per token id, if the request asked for them
    finish_reason: FinishReason | None = None
    usage: Usage | None = None  # with the last delta; None if the request was cancelled before it had a slot


OnDelta = Callable[[Delta], None]
OnError = Callable[[Exception], None]


class Handle:
    """A submitted request. Any thread may cancel it, at any time and more than once."""

    def __init__(self, wake: Callable[[], None], request_id: str | None = None) -> None:
        self.request_id = request_id  # names the request in the log
        self._wake = wake
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """End the request within one step; its last delta then says "cancelled", unless it finished before."""
        self._cancelled.set()
        self._wake()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()


@dataclass(frozen=True)
class Submission:
    """A request in the batcher's hands, from the queue to its last delta."""

    prepared: Future[GenerationRequest]  # done once its images are encoded
    on_delta: OnDelta
    on_error: OnError
    handle: Handle
    submitted: float = field(default_factory=time.monotonic)

    @property
    def is_ready(self) -> bool:
        return self.prepared.done()

    @property
    def failure(self) -> Exception | None:
        """Why its images could not be encoded; None if they are, or may still be."""
        if not self.is_ready:
            return None
        if self.prepared.cancelled():
            return EngineError("the images were not encoded; submit the request again")
        error = self.prepared.exception()
        return error if error is None or isinstance(error, Exception) else EngineError(f"encoding ended: {error!r}")
