"""Watches the scales of a calibration while samples are asked, and tells when more samples no longer move them."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Final

BLOCK: Final = 16  # samples between two looks at the scales
_STILL_BLOCKS = 2
_CLIP_CHANGE = 0.05  # a little more than a bin of the histograms (4 %), whose edges the clips are
# An abs_max hangs on a single number of millions, so those of some layers go on growing however many samples there are.
_MEAN_GROWTH = 0.02

Scales = Mapping[str, tuple[float, float]]  # layer -> abs_max, clip


class ScaleWatch:
    """Compares the scales after each BLOCK of samples with those of two blocks before."""

    def __init__(self) -> None:
        self._looks: list[Scales] = []

    def are_still(self, scales: Scales) -> bool:
        """Return whether the last two blocks moved no clip by more than 5 %, the abs_max of all layers by no more than
        2 % on average, and reached no new layer."""
        self._looks.append(scales)
        if len(self._looks) <= _STILL_BLOCKS:
            return False
        before = self._looks[-1 - _STILL_BLOCKS]
        if before.keys() != scales.keys() or not scales:
            return False
        clips = (_change(clip, before[name][1]) for name, (_, clip) in scales.items())
        growth = fmean(_change(abs_max, before[name][0]) for name, (abs_max, _) in scales.items())
        return growth <= _MEAN_GROWTH and max(clips) <= _CLIP_CHANGE


def _change(now: float, then: float) -> float:
    """Return the change as a share of `then`; inputs may all have been zero."""
    return 0.0 if now == then else abs(now - then) / then if then else float("inf")
