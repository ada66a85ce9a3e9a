"""The protocol that everything above a backend is written against. Nothing above knows which backend runs."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from nvlm_trt.engine import EngineLimits
from nvlm_trt.model.config import NvlmConfig

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
RangeArray = npt.NDArray[np.int32]

COMPONENTS = ("vision_encoder", "cross_kv", "decoder")  # cross_kv of NVLM-X and -H only


_Self = TypeVar("_Self", bound="Backend")


class Backend(Protocol):
    """Runs one engine and owns its buffers: the KV cache and the cross-attention cache, both split into slots.

    Not thread-safe: one thread drives prefill/decode. `encode` and `cross_kv` may run on another thread.
    T = config.tokens_per_tile, L = limits.max_seq_len, C = cross-attended tokens.
    """

    config: NvlmConfig
    limits: EngineLimits

    def encode(self, pixel_values: FloatArray) -> FloatArray:
        """[tiles, 3, E, E] -> image tokens [tiles, T, hidden], projector included."""
        ...

    def cross_kv(self, image_tokens: FloatArray) -> FloatArray:
        """One image's cross-attended tiles [n, T, hidden] -> [cross layers, 2 (key, value), kv_heads, C, head_dim].

        C = n * T for X; for H each tile's tokens follow its tag's text embeddings, C = n * (tag_length + T)."""
        ...

    def write_cross_kv(self, slot: int, start: int, cross_kv: FloatArray) -> None:
        """Copy one image's keys and values into a slot's cross-attention cache from token `start` on."""
        ...

    def prefill(
        self, slot: int, position: int, input_ids: IntArray, image_tokens: FloatArray, cross_ranges: RangeArray
    ) -> FloatArray:
        """Run input_ids [S] of one slot from `position` on; cross_ranges [S, 2].

        image_tokens [M, hidden] replace the M image tokens among input_ids, in order.
        Returns the last token's logits [vocab]."""
        ...

    def decode(self, input_ids: IntArray, positions: IntArray, cross_ranges: RangeArray) -> FloatArray:
        """One step of slots 0 .. n-1: input_ids [n], positions [n] (tokens already cached), cross_ranges [n, 2].
        Returns logits [n, vocab], valid until the next call."""
        ...

    def move_slot(self, source: int, target: int, length: int, cross_length: int) -> None:
        """Copy the first `length` cached and `cross_length` cross-attended tokens of a slot over another slot."""
        ...

    def close(self) -> None: ...

    def __enter__(self: _Self) -> _Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
