"""Adds up the magnitudes that were observed at the inputs of linear layers, over any number of runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from nvlm_trt.backends.base import FloatArray, RangeArray
from nvlm_trt.builders.quantization.calibration import LinearInput
from nvlm_trt.builders.quantization.magnitudes import int8_clip
from nvlm_trt.builders.quantization.observer import CHANNELS, COUNTS
from nvlm_trt.builders.quantization.scale_watch import Scales
from nvlm_trt.errors import EngineError
from nvlm_trt.model.precision import component_of

Counts = npt.NDArray[np.int64]  # [BINS]


class Observations:
    """Holds, by layer, the largest magnitude of each channel and the histogram of all magnitudes.

    Sums and maxima do not depend on the order of the runs."""

    def __init__(self) -> None:
        self._channels: dict[str, FloatArray] = {}
        self._counts: dict[str, Counts] = {}

    def add(self, name: str, channels: FloatArray, counts: Counts) -> None:
        """Add the largest magnitudes [inputs] and the counts [BINS] of some inputs of a layer."""
        # a maximum with NaN is NaN
        before = self._channels.get(name)
        self._channels[name] = channels.copy() if before is None else np.maximum(before, channels)
        self._counts[name] = counts + self._counts.get(name, 0)

    def add_reports(self, reports: Mapping[str, FloatArray], images_are_read: bool = True) -> None:
        """Add the extra outputs of an observing graph. `images_are_read`: whether any token of the run attends to an
        image. If none does, the graph discards what the gated blocks have computed, so it is not counted."""
        for output, channels in reports.items():
            if output.startswith(CHANNELS):
                name = output.removeprefix(CHANNELS)
                if images_are_read or not _is_in_gated_block(name):
                    self.add(name, channels, reports[COUNTS + name].astype(np.int64))

    def merge(self, other: Observations) -> None:
        for name, channels in other._channels.items():
            self.add(name, channels, other._counts[name])

    def scales(self) -> Scales:
        """Return abs_max and clip seen so far, by layer, for the layers that were reached.

        Raises EngineError for a layer whose inputs are not finite."""
        largest = {name: _largest(name, channels) for name, channels in self._channels.items()}
        return {name: (abs_max, int8_clip(self._counts[name], abs_max)) for name, abs_max in largest.items()}

    def check_finite(self) -> None:
        """Raise EngineError, which names the layer, for inputs that are not finite."""
        for name, channels in self._channels.items():
            _largest(name, channels)

    def linears(self) -> dict[str, LinearInput]:
        """Return the inputs seen so far, by layer in the order of names, for the layers that were reached.

        Raises EngineError for a layer whose inputs are not finite, or all zero."""
        return {name: _linear_input(name, self._channels[name], self._counts[name]) for name in sorted(self._channels)}

    def save(self, file: BinaryIO) -> None:
        arrays: dict[str, Any] = {CHANNELS + name: channels for name, channels in self._channels.items()}
        arrays |= {COUNTS + name: counts for name, counts in self._counts.items()}
        np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> Observations:
        observations = cls()
        with np.load(path, allow_pickle=False) as arrays:
            for output in arrays.files:
                if output.startswith(CHANNELS):
                    name = output.removeprefix(CHANNELS)
                    observations.add(name, arrays[output], arrays[COUNTS + name])
        return observations


def images_are_read(cross_ranges: RangeArray) -> bool:
    """Whether any token of cross_ranges [..., 2] attends to an image."""
    return bool((cross_ranges[..., 0] < cross_ranges[..., 1]).any())


def _is_in_gated_block(name: str) -> bool:
    """Whether a layer is in the decoder's part of a gated block: its keys and values are computed apart."""
    return component_of(name) == "cross_attention" and not name.endswith(("k_proj", "v_proj"))


def _largest(name: str, channels: FloatArray) -> float:
    abs_max = float(channels.max())
    if not np.isfinite(abs_max):
        raise EngineError(f"calibration: the inputs of {name} are not finite; check the checkpoint's weights")
    return abs_max


def _linear_input(name: str, channels: FloatArray, counts: Counts) -> LinearInput:
    abs_max = _largest(name, channels)
    if abs_max == 0:
        raise EngineError(
            f"calibration: the inputs of {name} are all zero, so they have no scale; build its component with fp32"
        )
    # a scale needs fewer than 6 digits, and 6 keep the file small
    rounded = [float(f"{value:.6g}") for value in channels]
    return LinearInput(
        abs_max=max(rounded), clip=float(f"{min(int8_clip(counts, abs_max), max(rounded)):.6g}"), channels=rounded
    )
