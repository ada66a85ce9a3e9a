"""Observes the times of one request as its events pass."""

from __future__ import annotations

import time
from collections.abc import Callable

from nvlm_trt.api import Delta, Usage
from nvlm_trt.serving.triton.models.answer_sender import Event
from nvlm_trt.serving.triton.models.histograms import (
    END_TO_END,
    FIRST_TOKEN,
    IMAGE_TILES,
    INTER_TOKEN,
    PROMPT_TOKENS,
    QUEUE_TIME,
)
from nvlm_trt.serving.triton.models.metrics import ModelMetrics


class ObservedRequest:
    """Passes the events of a request on. The text generator's thread calls it with each.

    The text generator's times are those of tokens: a response may hold several."""

    def __init__(self, metrics: ModelMetrics, put: Callable[[Event], None], arrived: float) -> None:
        """Observe a request that arrived at the time `arrived`, by time.monotonic()."""
        self._metrics = metrics
        self._put = put
        self._arrived = arrived
        self._last_tokens: dict[int, float] = {}  # by the answer's index

    def __call__(self, event: Event) -> None:
        if isinstance(event, Delta):
            self._observe(event)
        else:
            self._metrics.add_failure(event)
        self._put(event)

    def _observe(self, delta: Delta) -> None:
        now = time.monotonic()
        observe = self._metrics.observations.add
        if tokens := len(delta.token_ids):
            if not self._last_tokens:
                observe(FIRST_TOKEN, now - self._arrived)
            if delta.index not in self._last_tokens:
                tokens -= 1  # the first has no interval; those that come with it have one of 0 s
            interval = now - self._last_tokens.get(delta.index, now)
            for _ in range(tokens):
                observe(INTER_TOKEN, interval / tokens)
            self._last_tokens[delta.index] = now
        if delta.finish_reason in ("stop", "length") and delta.usage:  # of the answer that ends last
            observe(END_TO_END, now - self._arrived)
        if delta.usage:
            self._observe_usage(delta.usage)

    def _observe_usage(self, usage: Usage) -> None:
        observe = self._metrics.observations.add
        observe(QUEUE_TIME, usage.queue_s)
        observe(PROMPT_TOKENS, usage.prompt_tokens)
        observe(IMAGE_TILES, usage.image_tiles)
