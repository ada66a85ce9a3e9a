"""The protocol of a backend that runs an engine step by step. Nothing above it knows which backend runs."""

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

STAGES = ("vision_encoder", "cross_kv", "decoder")  # the graphs of an engine; cross_kv of NVLM-X and -H only


def stages_of(config: NvlmConfig) -> tuple[str, ...]:
    """The stages that an engine of this model has."""
    return tuple(stage for stage in STAGES if stage != "cross_kv" or config.cross_layers)


_Self = TypeVar("_Self", bound="StepBackend")


class BackendArray(Protocol):
    """An array in the memory of a backend, host or device. Only that backend looks into it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class ImageFeatures:
    """Holds one image as the decoder reads it, in the memory of the backend that made it.

    Requests share the features of one image, so nobody writes to them."""

    embeddings: BackendArray  # [m, hidden], replace the image placeholders of the prompt
    cross_kv: BackendArray | None  # [cross layers, 2 (key, value), kv_heads, C, head_dim]; None: nothing to read
    tiles: int  # thumbnail included

    @property
    def cross_tokens(self) -> int:
        """Tokens that the image adds to the cross-attended ones."""
        return 0 if self.cross_kv is None else self.cross_kv.shape[3]

    @property
    def nbytes(self) -> int:
        return self.embeddings.nbytes + (0 if self.cross_kv is None else self.cross_kv.nbytes)


class StepBackend(Protocol):
    """Runs one engine and owns its buffers: the KV cache and the cross-attention cache, both split into slots.

    Not thread-safe: one thread drives prefill and decode. `encode`, `import_tokens` and `features` may run on another.
    T = config.tokens_per_tile, L = limits.max_seq_len, C = cross-attended tokens. Every method raises RequestError for
    what does not fit the model or the engine, and EngineError when the runtime fails.
    """

    config: NvlmConfig
    limits: EngineLimits

    # --- images ------------------------------------------------------------------------------------------------------

    def encode(self, pixel_values: FloatArray) -> BackendArray:
        """[tiles, 3, E, E] -> image tokens [tiles, T, hidden], projector included."""
        ...

    def import_tokens(self, tokens: Any) -> BackendArray:
        """Copy image tokens [tiles, T, hidden] from outside: a NumPy array, or anything that DLPack carries."""
        ...

    def features(self, image_tokens: BackendArray) -> ImageFeatures:
        """Image tokens of all tiles of one image [tiles, T, hidden], thumbnail last -> what the decoder needs of it.

        cross_kv's C = n * T for the n cross-attended tiles of X; for H each tile's tokens follow its tag's text
        embeddings, C = n * (tag_length + T)."""
        ...

    # --- slots -------------------------------------------------------------------------------------------------------

    def write_cross_kv(self, slot: int, start: int, features: ImageFeatures) -> None:
        """Copy one image's keys and values into a slot's cross-attention cache from token `start` on."""
        ...

    def embeddings(self, images: Sequence[ImageFeatures], start: int, stop: int) -> BackendArray:
        """Rows start .. stop - 1 of the image embeddings of all `images`, one image behind the other: [M, hidden]."""
        ...

    def prefill(
        self, slot: int, position: int, input_ids: IntArray, embeddings: BackendArray, cross_ranges: RangeArray
    ) -> FloatArray:
        """Run input_ids [S] of one slot from `position` on; cross_ranges [S, 2].

        embeddings [M, hidden] replace the M image placeholders among input_ids, in order.
        Returns the last token's logits [vocab]."""
        ...

    def decode(self, input_ids: IntArray, positions: IntArray, cross_ranges: RangeArray) -> FloatArray:
        """One step of slots 0 .. n-1: input_ids [n], positions [n] (tokens already cached), cross_ranges [n, 2].
        Returns logits [n, vocab], valid until the next call."""
        ...

    def move_slot(self, source: int, target: int, length: int, cross_length: int) -> None:
        """Copy the first `length` cached and `cross_length` cross-attended tokens of a slot over another slot."""
        ...

    # --- lifetime ----------------------------------------------------------------------------------------------------

    def to_host(self, array: BackendArray) -> FloatArray:
        """Copy an array of this backend to the host, for comparisons."""
        ...

    def close(self) -> None:
        """Free everything; no method may be called afterwards."""
        ...

    def __enter__(self: _Self) -> _Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def embedding_rows(images: Iterable[ImageFeatures], start: int, stop: int) -> Iterator[Any]:
    """Slices of the images' embeddings, in order, that make up rows start .. stop - 1 of all of them together."""
    for image in images:
        rows = len(image.embeddings)
        first, last = max(start, 0), min(stop, rows)
        if first < last:
            embeddings: Any = image.embeddings
            yield embeddings[first:last]
        start, stop = start - rows, stop - rows


def host_array(tokens: Any) -> FloatArray:
    """float32 on the host, of a NumPy array or of anything that DLPack carries; torch helps where NumPy lacks the type
    (bfloat16) or the memory is a GPU's."""
    if not isinstance(tokens, np.ndarray):
        try:
            tokens = np.from_dlpack(tokens)
        except (BufferError, RuntimeError, TypeError, ValueError):
            import torch

            tokens = torch.from_dlpack(tokens).float().cpu().numpy()
    return np.ascontiguousarray(tokens, np.float32)
