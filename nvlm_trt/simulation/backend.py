"""Simulates an engine: implements `StepBackend` without weights or caches; every step only takes its time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from nvlm_trt.backends.base import BackendArray, FloatArray, ImageFeatures, IntArray, RangeArray
from nvlm_trt.closing import ClosedOnExit
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.simulation.step_seconds import StepSeconds

VOCABULARY = 512  # of the simulated answers: their ids mean nothing, and small logits are quick to draw from
TEXT_ID = 65  # that every answer consists of


class Clock(Protocol):
    """Lets time pass: simulated, or by sleeping."""

    def step(self, seconds: float) -> None: ...


@dataclass(frozen=True)
class Shape:
    """Stands for an array that is not there."""

    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return 0

    def __len__(self) -> int:
        return self.shape[0]


class SimulatedBackend(ClosedOnExit):
    """Implements the part of `StepBackend` that the scheduler uses. Moving slots takes no time."""

    def __init__(
        self,
        config: NvlmConfig,
        limits: EngineLimits,
        image_token_id: int,
        steps: StepSeconds,
        clock: Clock,
    ) -> None:
        self.config = replace(config, image_token_id=image_token_id, llm=replace(config.llm, vocab_size=VOCABULARY))
        self.limits = limits
        self._steps, self._clock = steps, clock
        self._logits = np.zeros((limits.max_slots, VOCABULARY), np.float32)
        self._logits[:, TEXT_ID] = 1

    def write_cross_kv(self, slot: int, start: int, features: ImageFeatures) -> None:
        pass

    def embeddings(self, images: Sequence[ImageFeatures], start: int, stop: int) -> BackendArray:
        return Shape((stop - start, self.config.llm.hidden_size))

    def prefill(
        self,
        slot: int,
        position: int,
        input_ids: IntArray,
        embeddings: BackendArray,
        cross_ranges: RangeArray,
        wants_logits: bool = True,
    ) -> FloatArray:
        cross_tokens = int(cross_ranges[:, 1].max())
        self._clock.step(self._steps.chunk(len(input_ids), position, cross_tokens))
        return self._logits[0]

    def decode(self, input_ids: IntArray, positions: IntArray, cross_ranges: RangeArray) -> FloatArray:
        cross_tokens = round(float(cross_ranges[:, 1].mean()))
        self._clock.step(self._steps.decode(len(input_ids), float(positions.mean()) + 1, cross_tokens))
        return self._logits[: len(input_ids)]

    def score_tokens(
        self, slot: int, position: int, input_ids: IntArray, cross_ranges: RangeArray
    ) -> FloatArray | None:
        return None

    def move_slot(self, source: int, target: int, length: int, cross_length: int) -> None:
        pass

    def swap_slots(self, first: int, second: int, length: int, cross_length: int) -> None:
        pass

    # --- images are encoded by the processor --------------------------------------------------------------------------

    def encode(self, pixel_values: FloatArray) -> BackendArray:
        raise NotImplementedError("a simulated engine has no pixels")

    def import_tokens(self, tokens: Any) -> BackendArray:
        raise NotImplementedError("a simulated engine has no image tokens")

    def features(self, image_tokens: BackendArray) -> ImageFeatures:
        raise NotImplementedError("a simulated engine has no image tokens")

    def to_host(self, array: BackendArray) -> FloatArray:
        raise NotImplementedError("a simulated engine has no arrays")

    def close(self) -> None:
        pass
