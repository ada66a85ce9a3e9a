"""Joins two backends: one runs the vision encoder, the other runs the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nvlm_trt.backends.base import BackendArray, FloatArray, ImageFeatures, IntArray, RangeArray, StepBackend
from nvlm_trt.closing import ClosedOnExit


class SplitBackend(ClosedOnExit):
    """Implements `StepBackend`: `vision` encodes, `text` does the rest. Image tokens go through host memory."""

    def __init__(self, vision: StepBackend, text: StepBackend) -> None:
        """Take over both backends: `close` closes them."""
        self.config, self.limits = text.config, text.limits
        self._vision, self._text = vision, text

    def encode(self, pixel_values: FloatArray) -> BackendArray:
        return self._text.import_tokens(self._vision.to_host(self._vision.encode(pixel_values)))

    def import_tokens(self, tokens: Any) -> BackendArray:
        return self._text.import_tokens(tokens)

    def features(self, image_tokens: BackendArray) -> ImageFeatures:
        return self._text.features(image_tokens)

    def write_cross_kv(self, slot: int, start: int, features: ImageFeatures) -> None:
        self._text.write_cross_kv(slot, start, features)

    def embeddings(self, images: Sequence[ImageFeatures], start: int, stop: int) -> BackendArray:
        return self._text.embeddings(images, start, stop)

    def prefill(
        self,
        slot: int,
        position: int,
        input_ids: IntArray,
        embeddings: BackendArray,
        cross_ranges: RangeArray,
        wants_logits: bool = True,
    ) -> FloatArray:
        return self._text.prefill(slot, position, input_ids, embeddings, cross_ranges, wants_logits)

    def decode(self, input_ids: IntArray, positions: IntArray, cross_ranges: RangeArray) -> FloatArray:
        return self._text.decode(input_ids, positions, cross_ranges)

    def score_tokens(
        self, slot: int, position: int, input_ids: IntArray, cross_ranges: RangeArray
    ) -> FloatArray | None:
        return self._text.score_tokens(slot, position, input_ids, cross_ranges)

    def move_slot(self, source: int, target: int, length: int, cross_length: int) -> None:
        self._text.move_slot(source, target, length, cross_length)

    def swap_slots(self, first: int, second: int, length: int, cross_length: int) -> None:
        self._text.swap_slots(first, second, length, cross_length)

    def to_host(self, array: BackendArray) -> FloatArray:
        return self._text.to_host(array)

    def close(self) -> None:
        self._vision.close()
        self._text.close()
