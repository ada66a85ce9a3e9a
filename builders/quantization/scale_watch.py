"""Watches the scales of a calibration while samples are asked, and tells when more samples no longer move them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

BLOCK: Final = 16  # samples between two looks at the scales
_STILL_BLOCKS = 2
_TOLERANCE = 0.05  # a little more than a bin of the histograms (4 %), whose edges the clips are
# An abs_max may hang on one number of millions, so some of many still grow when all else has come to rest.
_GROWING_LAYERS = 0.05

Scales = Mapping[str, tuple[float, float]]  # layer -> abs_max, clip


class ScaleWatch:
    """Compares the scales after each BLOCK of samples with those of two blocks before."""

    def __init__(self) -> None:
        self._looks: list[Scales] = []

    def are_still(self, scales: Scales) -> bool:
        """Return whether the last two blocks moved no clip by more than 5 %, and the abs_max of no more than 1 layer in
        20 by more than 5 %, and reached no new layer."""
        self._looks.append(scales)
        if len(self._looks) <= _STILL_BLOCKS:
            return False
        before = self._looks[-1 - _STILL_BLOCKS]
        if before.keys() != scales.keys():
            return False
        growing, clips_move = 0, False
        for name, (abs_max, clip) in scales.items():
            abs_max_then, clip_then = before[name]
            growing += abs_max - abs_max_then > _TOLERANCE * abs_max_then
            clips_move |= abs(clip - clip_then) > _TOLERANCE * clip_then
        return not clips_move and growing <= _GROWING_LAYERS * len(scales)
