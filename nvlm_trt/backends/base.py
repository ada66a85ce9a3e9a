"""Defines the protocol of a backend that runs an engine step by step. The layers above know no backend by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.config import NvlmConfig

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
RangeArray = npt.NDArray[np.int32]

STAGES = ("vision_encoder", "cross_kv", "decoder")  # the graphs of an engine; only NVLM-X and -H have cross_kv


def stages_of(config: NvlmConfig) -> tuple[str, ...]:
    """Return the stages that an engine of this model has."""
    return tuple(stage for stage in STAGES if stage != "cross_kv" or config.cross_layers)


_Self = TypeVar("_Self", bound="StepBackend")


class BackendArray(Protocol):
    """An array in the memory of a backend, on the host or a device. Only that backend reads its elements."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class ImageFeatures:
    """Holds one image as the decoder reads it, in the memory of the backend that made it.

    Requests share the features of an image, so the arrays are never written to."""

    embeddings: BackendArray  # [m, hidden], replace the image placeholders of the prompt
    # [cross layers, 2 (key, value), kv_heads, C, head_dim]; None: the image has no cross-attended tokens
    cross_kv: BackendArray | None
    tiles: int  # thumbnail included

    @property
    def cross_tokens(self) -> int:
        """Count the cross-attended tokens of the image."""
        return 0 if self.cross_kv is None else self.cross_kv.shape[3]

    @property
    def nbytes(self) -> int:
        return self.embeddings.nbytes + (0 if self.cross_kv is None else self.cross_kv.nbytes)


class StepBackend(Protocol):
    """Runs one engine and owns its buffers: the KV cache and the cross-attention cache, both split into slots.

    Not thread-safe: one thread calls `prefill` and `decode`. Another thread may call `encode`, `import_tokens` and
    `features`. T = config.tokens_per_tile, C = cross-attended tokens. Every method raises RequestError for a request
    that does not fit the model or the engine, and EngineError when the runtime fails.
    """

    config: NvlmConfig
    limits: EngineLimits

    # --- images ------------------------------------------------------------------------------------------------------

    def encode(self, pixel_values: FloatArray) -> BackendArray:
        """Encode pixel_values [tiles, 3, E, E] into image tokens [tiles, T, hidden], projector included."""
        ...

    def import_tokens(self, tokens: Any) -> BackendArray:
        """Copy image tokens [tiles, T, hidden] from outside: a NumPy array, or any tensor that supports DLPack."""
        ...

    def features(self, image_tokens: BackendArray) -> ImageFeatures:
        """Compute the features of one image from its image tokens [tiles, T, hidden], thumbnail last.

        C = n * T for the n cross-attended tiles of NVLM-X. In NVLM-H the text embeddings of each tile's tag stand
        before the tile's tokens: C = n * (tag_length + T)."""
        ...

    # --- slots -------------------------------------------------------------------------------------------------------

    def write_cross_kv(self, slot: int, start: int, features: ImageFeatures) -> None:
        """Copy the keys and values of one image into the cross-attention cache of a slot, from token `start` on."""
        ...

    def embeddings(self, images: Sequence[ImageFeatures], start: int, stop: int) -> BackendArray:
        """Return rows start .. stop - 1 of the concatenated image embeddings of all `images`: [M, hidden]."""
        ...

    def prefill(
        self,
        slot: int,
        position: int,
        input_ids: IntArray,
        embeddings: BackendArray,
        cross_ranges: RangeArray,
        wants_logits: bool = True,
    ) -> FloatArray:
        """Run input_ids [S] of one slot from `position` on; cross_ranges [S, 2].

        embeddings [M, hidden] replace the M image placeholders among input_ids, in order.
        Returns the logits [vocab] of the last token. Without `wants_logits`, nobody reads what is returned, and a
        backend that can skips lm_head and returns an empty array."""
        ...

    def decode(self, input_ids: IntArray, positions: IntArray, cross_ranges: RangeArray) -> FloatArray:
        """Run one step of slots 0 .. n-1: input_ids [n], positions [n] (tokens already cached), cross_ranges [n, 2].

        Returns logits [n, vocab], valid until the next call."""
        ...

    def score_tokens(
        self, slot: int, position: int, input_ids: IntArray, cross_ranges: RangeArray
    ) -> FloatArray | None:
        """Run input_ids [S], text only and S > 1, of one slot from `position` on; cross_ranges [S, 2].

        Returns the logits [S, vocab] of all tokens, valid until the next call, or None if the engine cannot."""
        ...

    def move_slot(self, source: int, target: int, length: int, cross_length: int) -> None:
        """Copy the first `length` cached and the first `cross_length` cross-attended tokens of `source` to `target`."""
        ...

    def swap_slots(self, first: int, second: int, length: int, cross_length: int) -> None:
        """Exchange the first `length` cached and the first `cross_length` cross-attended tokens of two slots."""
        ...

    # --- lifetime ----------------------------------------------------------------------------------------------------

    def to_host(self, array: BackendArray) -> FloatArray:
        """Copy an array of this backend to the host."""
        ...

    def close(self) -> None:
        """Free all memory; no method may be called afterwards."""
        ...

    def __enter__(self: _Self) -> _Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def embedding_rows(images: Iterable[ImageFeatures], start: int, stop: int) -> Iterator[Any]:
    """Yield slices of the images' embeddings: together they are rows start .. stop - 1 of the concatenation."""
    for image in images:
        rows = len(image.embeddings)
        first, last = max(start, 0), min(stop, rows)
        if first < last:
            embeddings: Any = image.embeddings
            yield embeddings[first:last]
        start, stop = start - rows, stop - rows


def host_array(tokens: Any) -> FloatArray:
    """Bring a NumPy array, or a tensor that supports DLPack, to the host as float32.

    Imports torch for types that NumPy lacks (bfloat16) and for GPU memory."""
    if not isinstance(tokens, np.ndarray):
        try:
            tokens = np.from_dlpack(tokens)
        except (BufferError, RuntimeError, TypeError, ValueError):
            import torch

            tokens = torch.from_dlpack(tokens).float().cpu().numpy()
    return np.ascontiguousarray(tokens, np.float32)
