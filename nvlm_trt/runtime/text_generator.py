"""Defines the protocol `TextGenerator`: the batcher over a step backend, or a runtime that batches by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from nvlm_trt.backends.base import BackendArray, FloatArray, ImageFeatures
from nvlm_trt.constraint import Constraint
from nvlm_trt.lane import IsOver, never
from nvlm_trt.runtime.grammar import Grammar
from nvlm_trt.runtime.request import Request


@dataclass(frozen=True)
class GeneratorOptions:
    max_queue: int = 64  # most requests that wait for a slot
    prefill_chunk: int | None = None  # most prompt tokens between two decoding steps; None: the backend's default
    prepare_constraints: bool = False  # when the engine is opened, so that the first constraint delays no other request
    reuse_prompts: bool = True  # keep the keys and values of prompts for later prompts that begin alike


@dataclass(frozen=True)
class GeneratorMetrics:
    """A snapshot, possibly taken in the middle of a step. Counters start with the generator."""

    queued: int  # requests without a slot
    active: int  # answers that are decoded, each in a slot
    free_slots: int
    tokens_generated: int
    requests_finished: Mapping[str, int]  # by "stop", "length", "cancelled" and "error"
    kept_prompts: int = 0  # of ended requests, for later prompts that begin alike
    prompt_tokens: int = 0  # of all requests that had a slot
    cached_tokens: int = 0  # of these, tokens whose keys and values an earlier prompt had left
    draft_tokens: int = 0  # drafted tokens that were checked
    accepted_draft_tokens: int = 0  # of these, tokens that became part of an answer


class TextGenerator(Protocol):
    """Answers several requests at once. Thread-safe."""

    def submit(self, request: Request) -> None:
        """Queue a request. Requests whose images are encoded get slots in the order of submission, one per answer.

        The generator calls the request's `on_delta` and `on_error`. `request.cancel()` ends the request.
        Raises QueueFullError, ParameterError for sampling parameters that the engine cannot follow, and EngineError
        after `close` or a failure of the engine."""
        ...

    def compile(self, constraint: Constraint, is_over: IsOver = never) -> Grammar:
        """Compile a constraint for `Request.grammar`. Raises ParameterError for one that the engine cannot follow, and
        AbandonedError if it still waits for its turn when `is_over` returns True."""
        ...

    def encode(self, pixel_values: FloatArray) -> BackendArray:
        """Encode pixel_values [tiles, 3, E, E] of one image into image tokens [tiles, T, hidden]."""
        ...

    def import_tokens(self, tokens: Any) -> BackendArray:
        """Copy image tokens [tiles, T, hidden] that were encoded elsewhere."""
        ...

    def features(self, image_tokens: BackendArray) -> ImageFeatures:
        """Prepare one image's tokens [tiles, T, hidden] for requests."""
        ...

    @property
    def healthy(self) -> bool:
        """Return False once the engine has failed: all requests ended with an error, and new ones are refused."""
        ...

    def metrics(self) -> GeneratorMetrics: ...

    def finish(self, drain: bool = True) -> None:
        """Refuse new requests, finish the submitted ones (cancel them unless `drain`), then return."""
        ...

    def close(self, drain: bool = True) -> None:
        """`finish`, then free the engine; no method may be called afterwards."""
        ...
