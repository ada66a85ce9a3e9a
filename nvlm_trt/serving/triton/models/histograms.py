"""Collects what requests take, and sends it to Triton's histograms."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

_SECONDS = (
    *(0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0),
)
_TOKENS = tuple(float(1 << bits) for bits in range(5, 18))  # 32 to 131,072
# text alone, then one to sixteen images of the default six tiles and a thumbnail
_TILES = (0.0, 1.0, 2.0, 4.0, 7.0, 14.0, 28.0, 56.0, 112.0)

_SENT_AT_ONCE = 256
# Bounds memory on a machine so busy that it sends fewer values than it makes tokens: the oldest are lost.
_MOST_UNSENT = 100_000


@dataclass(frozen=True)
class Histogram:
    """Describes a histogram. A bucket counts the values up to its bound; a last bucket counts all."""

    name: str
    description: str
    buckets: tuple[float, ...]


FIRST_TOKEN = Histogram(
    "nvlm_time_to_first_token_seconds", "Seconds from the arrival of a request to its first token", _SECONDS
)
INTER_TOKEN = Histogram(
    "nvlm_inter_token_latency_seconds", "Seconds between two consecutive tokens of a request", _SECONDS
)
END_TO_END = Histogram(
    "nvlm_e2e_request_latency_seconds",
    "Seconds from the arrival of a request to its last token, if it was answered to the end",
    _SECONDS,
)
QUEUE_TIME = Histogram(
    "nvlm_request_queue_time_seconds",
    "Seconds that a request waited for a slot, the encoding of its images included",
    _SECONDS,
)
PROMPT_TOKENS = Histogram(
    "nvlm_request_prompt_tokens",
    "Tokens of the prompt of a request that had a slot, image placeholders included",
    _TOKENS,
)
IMAGE_TILES = Histogram(
    "nvlm_request_image_tiles", "Tiles of the images of a request that had a slot, thumbnails included", _TILES
)
HISTOGRAMS = (FIRST_TOKEN, INTER_TOKEN, END_TO_END, QUEUE_TIME, PROMPT_TOKENS, IMAGE_TILES)


class Observations:
    """Keeps observations until `send`. Thread-safe; one thread sends."""

    def __init__(self, pb_utils: Any) -> None:
        family = pb_utils.MetricFamily
        # kept: a metric ends with its family
        self._families = {
            histogram: family(histogram.name, histogram.description, family.HISTOGRAM) for histogram in HISTOGRAMS
        }
        self._metrics = {
            histogram: of_histogram.Metric(labels={}, buckets=list(histogram.buckets))
            for histogram, of_histogram in self._families.items()
        }
        self._unsent: deque[tuple[Histogram, float]] = deque(maxlen=_MOST_UNSENT)

    def add(self, histogram: Histogram, value: float) -> None:
        """Keep a value. Takes less than a microsecond: the text generator's thread calls it for every token."""
        self._unsent.append((histogram, value))

    def send(self) -> bool:
        """Send up to _SENT_AT_ONCE values. Return whether more are left.

        Each is a round trip of 15 us, and much more on a busy machine: Triton takes one value at a time."""
        for _ in range(min(len(self._unsent), _SENT_AT_ONCE)):
            histogram, value = self._unsent.popleft()
            self._metrics[histogram].observe(value)
        return bool(self._unsent)
