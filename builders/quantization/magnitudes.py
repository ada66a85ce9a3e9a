"""Counts the magnitudes of a tensor's elements in bins whose widths grow with the magnitude.

Histograms, unlike percentiles, can be added up over any number of runs. Their size does not grow with the model.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from nvlm_trt.backends.base import FloatArray

BINS_PER_OCTAVE = 16  # edges 4 % apart
LOWEST_OCTAVE, HIGHEST_OCTAVE = -30, 30
BINS = (HIGHEST_OCTAVE - LOWEST_OCTAVE) * BINS_PER_OCTAVE
BIN_SCALE = BINS_PER_OCTAVE / math.log(2)  # bin = ln|x| * BIN_SCALE - FIRST_BIN, rounded down
FIRST_BIN = LOWEST_OCTAVE * BINS_PER_OCTAVE

_INT8_LARGEST = 127


def bin_edges() -> npt.NDArray[np.float64]:
    """Return edges [BINS + 1]: bin i counts edges[i] <= |x| < edges[i + 1], the outer bins also all |x| beyond."""
    return 2.0 ** (LOWEST_OCTAVE + np.arange(BINS + 1) / BINS_PER_OCTAVE)


def int8_clip(counts: npt.NDArray[np.int64], abs_max: float) -> float:
    """Find the magnitude at which 8-bit integers should saturate for the least squared error, at most `abs_max`.

    With a step d = clip / 127, an element below d / 2 becomes 0 (squared error x ** 2), an element below clip is
    rounded (d ** 2 / 12 on average), and a larger element becomes clip ((x - clip) ** 2). An outlier thus counts by
    the square of its error; a percentile would count it like any other element."""
    edges = bin_edges()
    used = np.flatnonzero(counts)
    centers = np.sqrt(edges[used] * edges[used + 1])
    weights = counts[used].astype(np.float64)
    best, best_error = abs_max, math.inf
    for clip in [abs_max, *(edge for edge in edges[used + 1][::-1] if edge < abs_max)]:
        step = clip / _INT8_LARGEST
        rounding = np.where(centers < step / 2, centers**2, step**2 / 12)
        error = float(weights @ np.where(centers > clip, (centers - clip) ** 2, rounding))
        if error < best_error:
            best, best_error = float(clip), error
    return best


def count(values: FloatArray) -> npt.NDArray[np.int64]:
    """Count an array's elements into a histogram [BINS], as the observing graphs do."""
    magnitudes = np.maximum(np.abs(values.reshape(-1)), 2.0**LOWEST_OCTAVE)
    bins = np.floor(np.log(magnitudes) * BIN_SCALE).astype(np.int64) - FIRST_BIN
    return np.bincount(np.clip(bins, 0, BINS - 1), minlength=BINS)
