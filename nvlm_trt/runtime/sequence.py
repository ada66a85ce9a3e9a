"""One request on its way through the engine: what is cached, what is next, what has been generated."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from nvlm_trt.backends.base import Backend, FloatArray, IntArray, RangeArray
from nvlm_trt.errors import RequestError
from nvlm_trt.prompt.detokenizer import IncrementalDecoder
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.generation import Delta, FinishReason, Submission, Usage
from nvlm_trt.runtime.sampling import Sampler
from nvlm_trt.runtime.text_stream import TextStream


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of a prompt, with the image tokens that replace some of them."""

    position: int
    input_ids: IntArray  # [S]
    image_tokens: FloatArray  # [M, hidden]
    cross_ranges: RangeArray  # [S, 2]


class Sequence:
    """The state of one admitted request, whose images are encoded. `slot` is the cache row that it owns."""

    def __init__(self, submission: Submission, backend: Backend, tokenizer: Tokenizer) -> None:
        request = submission.prepared.result(timeout=0)
        image_token_id = backend.config.image_token_id
        assert image_token_id is not None, "read_config finds it in the tokenizer"
        self.submission = submission
        self.slot = -1
        self.cached = 0  # tokens in the KV cache
        self.cross_length = request.prompt.cross_tokens
        self._request = request
        self._image_token_id = image_token_id
        self._stop_ids = frozenset() if request.sampling.ignore_eos else tokenizer.stop_ids
        self._image_tokens = request.llm_image_tokens(backend.config.llm.hidden_size)  # [M, hidden], not yet prefilled
        if len(self._image_tokens) != request.prompt.llm_image_tokens:
            raise RequestError(
                f"{request.prompt.llm_image_tokens} image tokens in the prompt, {len(self._image_tokens)} were given"
            )
        # an image token in the answer would be replaced by an image's features
        self._sampler = Sampler(request.sampling, request.prompt.input_ids, banned_ids={image_token_id})
        self._text = TextStream(IncrementalDecoder(tokenizer), request.sampling.stop)
        self._last_id = -1
        self._generated = 0
        self._max_tokens = min(request.sampling.max_tokens, backend.limits.max_seq_len - len(request.prompt.input_ids))
        if self._max_tokens < 1:
            raise RequestError(
                f"the prompt has {len(request.prompt.input_ids)} tokens, the engine holds "
                f"{backend.limits.max_seq_len} with the answer; shorten it or rebuild with --max-seq-len"
            )
        self._admitted = time.monotonic()
        self._first_token: float | None = None

    @property
    def is_prefilled(self) -> bool:
        return self.cached >= len(self._request.prompt.input_ids)

    def write_cross_kv(self, backend: Backend) -> None:
        """Copy the images' keys and values into this sequence's slot, one behind the other."""
        start = 0
        for image in self._request.images:
            if image.cross_kv is not None:
                backend.write_cross_kv(self.slot, start, image.cross_kv)
                start += image.cross_kv.shape[3]
        assert start == self.cross_length, (start, self.cross_length)

    def next_chunk(self, size: int) -> Chunk:
        """The next `size` tokens of the prompt, or what is left of it; counted as cached from now on."""
        prompt, start = self._request.prompt, self.cached
        input_ids = prompt.input_ids[start : start + size]
        images = int(np.count_nonzero(input_ids == self._image_token_id))
        chunk = Chunk(start, input_ids, self._image_tokens[:images], prompt.cross_ranges[start : start + size])
        self._image_tokens = self._image_tokens[images:]
        self.cached += len(input_ids)
        return chunk

    def next_token(self) -> tuple[int, int, tuple[int, int]]:
        """What one decoding step needs: (token id, its position, its cross-attention range); then it is cached."""
        self.cached += 1
        return self._last_id, self.cached - 1, self._request.decode_range

    def accept(self, logits: FloatArray) -> Delta:
        """Draw the next token from logits [vocab]. Raises EngineError if they are not finite."""
        token_id, logprob = self._sampler.sample(logits)
        self._first_token = self._first_token or time.monotonic()
        self._last_id = token_id
        self._generated += 1
        text, finish_reason = self._advance_text(token_id)
        return Delta(
            text=text,
            token_ids=[token_id],
            logprobs=[logprob] if logprob else [],
            finish_reason=finish_reason,
            usage=self.usage() if finish_reason else None,
        )

    def _advance_text(self, token_id: int) -> tuple[str, FinishReason | None]:
        if token_id in self._stop_ids:
            return self._text.flush(), "stop"
        text = self._text.push(token_id)
        if self._text.stopped:
            return text, "stop"
        if self._generated >= self._max_tokens:
            return text + self._text.flush(), "length"
        return text, None

    def usage(self) -> Usage:
        """What the request has taken up to now."""
        request, submitted = self._request, self.submission.submitted
        return Usage(
            prompt_tokens=len(request.prompt.input_ids),
            completion_tokens=self._generated,
            image_tiles=sum(image.tiles for image in request.images),
            cross_tokens=request.prompt.cross_tokens,
            cached_images=request.cached_images,
            encode_s=request.encode_s,
            queue_s=self._admitted - submitted,
            ttft_s=self._first_token - submitted if self._first_token else None,
            total_s=time.monotonic() - submitted,
        )
