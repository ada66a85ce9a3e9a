"""The protocol of what answers requests: the batcher over a step backend, or a runtime that batches by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from nvlm_trt.backends.base import BackendArray, FloatArray, ImageFeatures
from nvlm_trt.runtime.request import Request


@dataclass(frozen=True)
class GeneratorOptions:
    max_queue: int = 64  # requests waiting for a slot
    prefill_chunk: int | None = None  # prompt tokens between two decoding steps; None: the backend's


@dataclass(frozen=True)
class GeneratorMetrics:
    """A snapshot, possibly of the middle of a step. Counters run from the start."""

    queued: int  # submitted, without a slot
    active: int  # being decoded
    free_slots: int
    tokens_generated: int
    requests_finished: Mapping[str, int]  # by "stop", "length", "cancelled" and "error"


class TextGenerator(Protocol):
    """Answers requests, several at once. Any thread may call it."""

    def submit(self, request: Request) -> None:
        """Queue a request, whose images may still be encoded: it gives a slot to requests that are ready, in the order
        of their submission, and tells each of its deltas. `request.cancel()` ends it.

        Raises QueueFullError, and EngineError after `close` or a failure of the engine."""
        ...

    def encode(self, pixel_values: FloatArray) -> BackendArray:
        """[tiles, 3, E, E] of one image -> its image tokens [tiles, T, hidden]."""
        ...

    def import_tokens(self, tokens: Any) -> BackendArray:
        """Copy image tokens [tiles, T, hidden] that were encoded elsewhere."""
        ...

    def features(self, image_tokens: BackendArray) -> ImageFeatures:
        """Prepare one image's tokens [tiles, T, hidden] for requests."""
        ...

    @property
    def healthy(self) -> bool:
        """False once the engine has failed: every request was told, and no new one is accepted."""
        ...

    def metrics(self) -> GeneratorMetrics: ...

    def finish(self, drain: bool = True) -> None:
        """Accept nothing more; finish what was submitted, or cancel it unless `drain`; return when that is done."""
        ...

    def close(self, drain: bool = True) -> None:
        """`finish`, then free the engine; no method may be called afterwards."""
        ...
