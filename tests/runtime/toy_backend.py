"""Replaces an engine by a deterministic toy, in which every logit depends on all that a real engine's may depend on.

Each cached token is a number made of its id (or image token) and of the cross-attended tokens in its range; logits are
made of all numbers cached in the slot. So a token that is read from or written to a wrong place changes the answer.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nvlm_trt.api import Delta, SamplingParams, Usage
from nvlm_trt.backends.base import ImageFeatures, embedding_rows
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.prompt.encoder import EncodedPrompt
from nvlm_trt.prompt.tokenizer import Tokenizer, write_byte_tokenizer
from nvlm_trt.runtime.request import Request
from nvlm_trt.runtime.sampling import Sampler, answer_seed

CONFIG = PRESETS["nvlm-x-tiny"]
HIDDEN = CONFIG.llm.hidden_size
POISON = 7  # a prompt that begins with this token gets logits that are not finite
POISONED_FROM = 20  # ... once this many tokens are cached


def byte_tokenizer(directory: Path) -> Tokenizer:
    write_byte_tokenizer(directory, CONFIG.max_tiles)
    return Tokenizer.from_directory(directory)


class ToyBackend:
    """Implements the part of `StepBackend` that the batcher uses; keeps a log of calls. `image_token_id` is the
    tokenizer's."""

    def __init__(self, image_token_id: int, max_slots: int = 3, max_seq_len: int = 64, max_image_tokens: int = 24):
        self.config = dataclasses.replace(CONFIG, image_token_id=image_token_id)
        self.limits = EngineLimits(max_slots=max_slots, max_seq_len=max_seq_len, max_image_tokens=max_image_tokens)
        garbage = np.random.default_rng(0)
        self._values = garbage.integers(1 << 32, size=(max_slots, max_seq_len))
        self._memory = garbage.random((max_slots, max_image_tokens), np.float32)
        self._poisoned = np.zeros(max_slots, bool)
        self._logits = np.zeros((max_slots, CONFIG.llm.vocab_size), np.float32)
        self.calls: list[tuple[str, int]] = []  # ("prefill", tokens) or ("decode", slots)
        self.admitted: list[int] = []  # first token of each prompt
        self.prompts_read = 0  # times that logits of a prompt were made
        self.moves = 0
        self.fail_with: Exception | None = None  # in any call
        self.refuse_prefill: Exception | None = None

    def write_cross_kv(self, slot: int, start: int, features: ImageFeatures) -> None:
        assert features.cross_kv is not None
        self._memory[slot, start : start + features.cross_tokens] = features.cross_kv[0, 0, 0, :, 0]

    def embeddings(self, images: Sequence[ImageFeatures], start: int, stop: int) -> np.ndarray:
        return np.concatenate([np.empty((0, HIDDEN), np.float32), *embedding_rows(images, start, stop)])

    def prefill(
        self,
        slot: int,
        position: int,
        input_ids: np.ndarray,
        embeddings: np.ndarray,
        cross_ranges: np.ndarray,
        wants_logits: bool = True,
    ) -> np.ndarray:
        self._begin("prefill", len(input_ids))
        if self.refuse_prefill:
            raise self.refuse_prefill
        if position == 0:
            self.admitted.append(int(input_ids[0]))
            self._poisoned[slot] = input_ids[0] == POISON
        images = list(embeddings)
        for offset, (token_id, (start, end)) in enumerate(zip(input_ids, cross_ranges, strict=True)):
            content = images.pop(0).tobytes() if token_id == self.config.image_token_id else int(token_id)
            self._values[slot, position + offset] = value(content, self._memory[slot, start:end])
        assert not images
        if not wants_logits:
            return self._logits[:0].reshape(-1)
        self.prompts_read += 1
        return self._read(slot, position + len(input_ids))

    def decode(self, input_ids: np.ndarray, positions: np.ndarray, cross_ranges: np.ndarray) -> np.ndarray:
        self._begin("decode", len(input_ids))
        rows = zip(input_ids, positions, cross_ranges, strict=True)
        for slot, (token_id, position, (start, end)) in enumerate(rows):
            assert token_id != self.config.image_token_id
            self._values[slot, position] = value(int(token_id), self._memory[slot, start:end])
            self._read(slot, position + 1)
        return self._logits[: len(input_ids)]

    def score_tokens(
        self, slot: int, position: int, input_ids: np.ndarray, cross_ranges: np.ndarray
    ) -> np.ndarray | None:
        self._begin("score", len(input_ids))
        assert len(input_ids) > 1
        assert self.config.image_token_id not in input_ids
        rows = []
        for token_id, (start, end) in zip(input_ids, cross_ranges, strict=True):
            self._values[slot, position] = value(int(token_id), self._memory[slot, start:end])
            position += 1
            rows.append(self._read(slot, position).copy())
        return np.array(rows)

    def move_slot(self, source: int, target: int, length: int, cross_length: int) -> None:
        self._logits[:] = np.nan  # no longer valid
        self.moves += 1
        for cache, used in ((self._values, length), (self._memory, cross_length)):
            row = cache[source].copy()
            cache[target] = 12345  # nothing may be read there, except:
            cache[target, :used] = row[:used]
        self._poisoned[target] = self._poisoned[source]

    def swap_slots(self, first: int, second: int, length: int, cross_length: int) -> None:
        self._logits[:] = np.nan
        self.moves += 1
        for cache, used in ((self._values, length), (self._memory, cross_length)):
            rows = cache[[second, first]]
            rows[:, used:] = 12345
            cache[[first, second]] = rows
        self._poisoned[[first, second]] = self._poisoned[[second, first]]

    def close(self) -> None:
        self.calls.append(("close", 0))

    def _begin(self, name: str, size: int) -> None:
        if self.fail_with:
            raise self.fail_with
        self._logits[:] = np.nan  # what the last call returned is valid no longer
        self.calls.append((name, size))

    def _read(self, slot: int, length: int) -> np.ndarray:
        self._logits[slot] = logits_of(self._values[slot, :length])
        if self._poisoned[slot] and length >= POISONED_FROM:
            self._logits[slot, 3] = np.nan
        return self._logits[slot]


def value(content: int | bytes, memory: np.ndarray) -> int:
    return zlib.crc32(repr((content, memory.astype(np.float32).tobytes())).encode())


def logits_of(values: np.ndarray) -> np.ndarray:
    """Makes logits [vocab] of [cached tokens]; ids 256 and 258, the byte tokenizer's ends of text, win now and then."""
    logits = np.random.default_rng(zlib.crc32(values.tobytes())).normal(size=CONFIG.llm.vocab_size).astype(np.float32)
    logits[[256, 258]] += 1.2
    return logits


@dataclass(frozen=True)
class Asked:
    """One request: its prompt, its images, its sampling."""

    prompt: EncodedPrompt
    sampling: SamplingParams
    images: list[ImageFeatures]
    image_keys: Sequence[str | None] | None = None  # None: every image is unlike any other

    def request(self, receiver: Receiver, ready: bool = True) -> Request:
        """Makes the request to submit. Unless `ready`, its images are still being encoded."""
        request = Request(self.sampling, receiver.on_delta, receiver.on_error)
        if ready:
            self.provide(request)
        return request

    @property
    def is_image(self) -> np.ndarray:
        """Which of the prompt's tokens are image placeholders: [S]; no text has ids above 127."""
        return self.prompt.input_ids > 127

    def provide(self, request: Request) -> None:
        request.provide(self.prompt, self.images, image_keys=self.image_keys)


def ask(
    image_token_id: int,
    seed: int,
    length: int = 10,
    images: int = 0,
    sampling: SamplingParams | None = None,
    first_token: int = 65,
) -> Asked:
    """A random prompt of `length` tokens with `images` images of several tokens in sequence and memory each."""
    random = np.random.default_rng(seed)
    features = []
    for _ in range(images):
        tokens = random.random((random.integers(1, 4), HIDDEN), np.float32)
        cross_kv = random.random((1, 2, 1, random.integers(1, 6), 1), np.float32)
        features.append(ImageFeatures(tokens, cross_kv, tiles=2))
    in_llm = sum(len(image.embeddings) for image in features)
    in_memory = sum(image.cross_tokens for image in features)
    input_ids = random.integers(32, 127, length + in_llm)
    input_ids[random.choice(np.arange(1, length + in_llm), in_llm, replace=False)] = image_token_id
    input_ids[0] = first_token
    ranges = np.sort(random.integers(0, in_memory + 1, (length + in_llm, 2)), axis=1).astype(np.int32)
    prompt = EncodedPrompt(input_ids.astype(np.int64), ranges, in_llm, in_memory)
    keys = [f"image {i} of {seed}" for i in range(images)]
    return Asked(prompt, sampling or SamplingParams(), features, keys)


def follow_up(asked: Asked, kept: int, seed: int, length: int, sampling: SamplingParams) -> Asked:
    """A prompt that begins with the first `kept` tokens of another, has its images too, and `length` tokens of text."""
    random = np.random.default_rng(seed)
    before = asked.prompt
    place_holder = before.input_ids[asked.is_image][:1]
    missing = np.repeat(place_holder, int(asked.is_image[kept:].sum()))
    input_ids = np.concatenate([before.input_ids[:kept], missing, random.integers(32, 127, length)])
    new = (len(input_ids) - len(before.input_ids[:kept]), 2)
    ranges = np.sort(random.integers(0, before.cross_tokens + 1, new), axis=1).astype(np.int32)
    ranges = np.concatenate([before.cross_ranges[:kept], ranges])
    prompt = EncodedPrompt(input_ids.astype(np.int64), ranges, before.placeholders, before.cross_tokens)
    return Asked(prompt, sampling, asked.images, asked.image_keys)


def with_other_image(asked: Asked, index: int) -> Asked:
    """The same prompt about other images: image `index` has the same shape and another content."""
    images, keys = list(asked.images), list(asked.image_keys or ())
    image = images[index]
    images[index] = dataclasses.replace(image, embeddings=image.embeddings + 1, cross_kv=image.cross_kv + 1)  # type: ignore[operator]
    keys[index] = f"not {keys[index]}"
    return dataclasses.replace(asked, images=images, image_keys=keys)


def tokens_alone(backend: ToyBackend, tokenizer: Tokenizer, asked: Asked, index: int = 0) -> list[int]:
    """Computes the tokens of one of the request's answers by the toy's definition, as those of a request of its own:
    without slots, chunks, neighbours and stop strings."""
    sampling = asked.sampling.model_copy(update={"seed": answer_seed(asked.sampling.seed, index), "n": 1})
    stop_ids = () if sampling.ignore_eos else tokenizer.stop_ids
    prompt, image_token_id = asked.prompt, backend.config.image_token_id
    memory = np.concatenate([np.empty(0, np.float32), *(kv.cross_kv[0, 0, 0, :, 0] for kv in asked.images)])  # type: ignore[index]
    images = (row for image in asked.images for row in image.embeddings)  # type: ignore[attr-defined]
    values = [
        value(next(images).tobytes() if token_id == image_token_id else int(token_id), memory[start:end])
        for token_id, (start, end) in zip(prompt.input_ids, prompt.cross_ranges, strict=True)
    ]
    sampler = Sampler(sampling, prompt.input_ids, {image_token_id}, stop_ids)  # type: ignore[arg-type]
    tokens: list[int] = []
    while len(tokens) < asked.sampling.max_tokens and len(prompt.input_ids) + len(tokens) < backend.limits.max_seq_len:
        tokens.append(sampler.sample(logits_of(np.array(values)))[0])
        if tokens[-1] in stop_ids:
            break
        values.append(value(tokens[-1], memory))
    return tokens


class Receiver:
    """Collects the deltas and the error of one request, and checks that nothing follows the end of an answer or of the
    request."""

    def __init__(self, n: int = 1) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(n)]  # of each answer
        self.texts = [""] * n
        self.reasons: list[str | None] = [None] * n
        self.error: Exception | None = None
        self.usage: Usage | None = None

    def on_delta(self, delta: Delta) -> None:
        assert not self.ended
        assert self.reasons[delta.index] is None
        self.tokens[delta.index] += delta.token_ids
        self.texts[delta.index] += delta.text
        self.reasons[delta.index] = delta.finish_reason
        assert delta.usage is None or self.ended
        self.usage = delta.usage

    def on_error(self, error: Exception) -> None:
        assert not self.ended
        self.error = error

    @property
    def ended(self) -> bool:
        return None not in self.reasons or self.error is not None

    # --- of a request for one answer ---------------------------------------------------------------------------------

    @property
    def token_ids(self) -> list[int]:
        (tokens,) = self.tokens
        return tokens

    @property
    def text(self) -> str:
        (text,) = self.texts
        return text

    @property
    def finish_reason(self) -> str | None:
        (reason,) = self.reasons
        return reason
