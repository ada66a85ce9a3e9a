"""Reads one weight of a checkpoint when it is asked for: stored numbers, FP8 times its scales, a LoRA update added."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from nvlm_trt.checkpoint.dummy_heads import real_heads
from nvlm_trt.checkpoint.lora import LowRankUpdate
from nvlm_trt.checkpoint.safetensors_file import FloatArray, SafetensorsFile


@dataclass(frozen=True)
class LazyWeight:
    """A tensor that every call of `load` and `rows` reads again; valid while its checkpoint is open."""

    name: str
    shape: tuple[int, ...]
    file: SafetensorsFile
    scales: FloatArray | None = None  # [stored rows] or [1], of an FP8 tensor
    update: LowRankUpdate | None = None  # of the stored shape

    @property
    def stored_scales(self) -> FloatArray | None:
        """The scales [rows] or [1], if the tensor is exactly its stored FP8 numbers times these."""
        whole = self.update is None and self.file.records[self.name].shape == self.shape
        return self.scales if whole else None

    def load(self) -> FloatArray:
        """Reads the tensor as a new float32 array, without dummy heads. BF16, F16 and F32 convert exactly."""
        stored = self.file.load(self.name)
        self._scale(stored, slice(None))
        if self.update is not None:
            self.update.add_to(stored, 0)
        return stored if stored.shape == self.shape else real_heads(self.name, stored, self.shape)

    def rows(self, start: int, stop: int) -> FloatArray:
        """Reads rows [start, stop) of the array that `load` returns, [stop - start, ...], and no others."""
        record = self.file.records[self.name]
        if record.shape != self.shape:
            return self._real_rows(start, stop, record.shape)
        out = np.empty((stop - start, *self.shape[1:]), np.float32)
        self.file.read_floats(self.name, record, start * math.prod(self.shape[1:]), out.reshape(-1))
        self._scale(out, slice(start, stop))
        if self.update is not None:
            self.update.add_to(out, start)
        return out

    def pick(self, ids: npt.NDArray[np.int64]) -> FloatArray:
        """Reads rows `ids` [n] of a matrix, [n, columns]."""
        picked = [self.rows(int(row), int(row) + 1) for row in ids]
        return np.concatenate(picked) if picked else np.empty((0, *self.shape[1:]), np.float32)

    def _scale(self, stored: FloatArray, rows: slice | npt.NDArray[np.int64]) -> None:
        """Multiplies the stored rows `rows` of an FP8 tensor by their scales."""
        if self.scales is not None:
            scales = self.scales if len(self.scales) == 1 else self.scales[rows]
            stored *= scales.reshape(-1, *[1] * (stored.ndim - 1))

    def _real_rows(self, start: int, stop: int, stored: tuple[int, ...]) -> FloatArray:
        """Reads rows of a tensor that is stored with dummy heads."""
        if len(self.shape) == 1:  # small
            return self.load()[start:stop]
        parts = 3 if ".attn.qkv." in self.name else 1  # q, k and v, each with dummy heads behind its own
        part, row = np.divmod(np.arange(start, stop), self.shape[0] // parts)
        places = part * (stored[0] // parts) + row
        rows = self.file.load_rows(self.name, places)
        self._scale(rows, places)
        if self.update is not None:
            for first, last in _runs(places):
                self.update.add_to(rows[first:last], int(places[first]))
        return np.ascontiguousarray(rows[:, : self.shape[1]])


def _runs(places: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yields [first, last) of each part of ascending `places` in which one follows the other."""
    return pairwise([0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)])
