"""Watches the scales of a calibration while samples are asked, and tells when more samples no longer move them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

BLOCK: Final = 16  # samples between two looks at the scales
_STILL_BLOCKS = 2
_TOLERANCE = 0.05  # a little more than a bin of the histograms (4 %), from whose edges the clips are chosen

Scales = Mapping[str, tuple[float, float]]  # layer -> abs_max, clip


class ScaleWatch:
    """Compares the scales after each BLOCK of samples with those of two blocks before."""

    def __init__(self) -> None:
        self._looks: list[Scales] = []

    def are_still(self, scales: Scales) -> bool:
        """Return whether the last two blocks moved neither abs_max nor clip of any layer by more than 5 %, and reached
        no new layer."""
        self._looks.append(scales)
        if len(self._looks) <= _STILL_BLOCKS:
            return False
        before = self._looks[-1 - _STILL_BLOCKS]
        return before.keys() == scales.keys() and all(
            abs(now - then) <= _TOLERANCE * then
            for name, of_layer in scales.items()
            for now, then in zip(of_layer, before[name], strict=True)
        )
