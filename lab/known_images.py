"""Opens an engine for benchmarks of what comes after the vision encoder: image tokens are drawn, and images known."""

from __future__ import annotations

import itertools
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nvlm_trt.api import ChatRequest, Delta, ImagePart, Message, SamplingParams, TextPart, Usage
from nvlm_trt.engine import Engine
from nvlm_trt.runtime.pipeline import Pipeline, RuntimeOptions

WAIT = 600.0  # seconds until a benchmark gives up


def open_without_vision(engine: Engine, threads: int, options: RuntimeOptions) -> Pipeline:
    """Opens an engine whose images get random image tokens, the same for the same pixels."""
    config = engine.config

    def encode_tiles(tiles: npt.NDArray[np.uint8]) -> Any:
        random = np.random.default_rng(zlib.crc32(tiles.tobytes()))
        shape = (len(tiles), config.tokens_per_tile, config.llm.hidden_size)
        return random.standard_normal(shape, np.float32) * np.float32(0.02)

    return Pipeline.open(engine.path, threads=threads, encode_tiles=encode_tiles, options=options)


def question(text: str, image: bytes | None = None) -> Message:
    return Message("user", [*([ImagePart(image)] if image else []), TextPart(text)])


def know(pipeline: Pipeline, image: bytes) -> None:
    """Brings an image into the image cache. Its prompt begins like no other and is not read to the end."""
    before = pipeline.metrics().image_cache.misses
    asked = Started(pipeline, [Message("system", f"Unlike any other, {time.time_ns()}."), question("?", image)], 1)
    while pipeline.metrics().image_cache.misses == before:
        time.sleep(0.001)
    asked.request.cancel()
    asked.wait()


@dataclass(frozen=True)
class Answered:
    """The times of one answer in seconds, and its tokens."""

    ttft: float
    gaps: list[float]  # between two tokens
    token_ids: list[int]
    usage: Usage | None


class Started:
    """A greedy request for `tokens` tokens that was submitted, and notes when each token comes."""

    def __init__(self, pipeline: Pipeline, messages: Sequence[Message], tokens: int, **sampling: Any) -> None:
        self._times: list[float] = []
        self._deltas: list[Delta] = []
        self._error: Exception | None = None
        self._ended = False
        self._started = time.perf_counter()
        chat = ChatRequest(messages, (), SamplingParams(**{"max_tokens": tokens, "ignore_eos": True, **sampling}))
        self.request = pipeline.submit(chat, self._note, self._fail)

    def _note(self, delta: Delta) -> None:
        self._times += [time.perf_counter()] * len(delta.token_ids)
        self._deltas.append(delta)
        self._ended = delta.finish_reason is not None

    def _fail(self, error: Exception) -> None:
        self._error, self._ended = error, True

    def wait(self) -> Answered:
        """Waits for the end. Raises the request's error."""
        give_up = time.monotonic() + WAIT
        while not self._ended and time.monotonic() < give_up:
            time.sleep(0.002)
        if self._error:
            raise self._error
        assert self._ended, f"no answer within {WAIT} s"
        times = self._times or [self._started]
        gaps = [after - before for before, after in itertools.pairwise(times)]
        token_ids = [token_id for delta in self._deltas for token_id in delta.token_ids]
        return Answered(times[0] - self._started, gaps, token_ids, self._deltas[-1].usage)


def spent(method: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """Wraps a method of a backend: the duration of each call is added to `seconds`."""

    def timed(*arguments: Any) -> Any:
        started = time.perf_counter()
        result = method(*arguments)
        seconds.append(time.perf_counter() - started)
        return result

    return timed
