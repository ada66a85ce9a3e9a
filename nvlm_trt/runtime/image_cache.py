"""Caches the features of images, so that an image asked about twice is encoded once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass

from cachetools import LRUCache

from nvlm_trt.backends.base import ImageFeatures
from nvlm_trt.lane import AbandonedError, IsOver, never

_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class ImageCacheMetrics:
    """A snapshot. `hits` and `misses` count from the start; waiting for another request's encoding is a hit."""

    hits: int
    misses: int
    images: int
    nbytes: int


class ImageCache:
    """Keeps features up to a number of bytes, and drops the least recently used first. Thread-safe.

    Requests that need the same new image at the same time share one encoding.
    """

    def __init__(self, capacity: int) -> None:
        """Make an empty cache of `capacity` bytes; 0 keeps nothing. Features larger than the capacity are not kept."""
        self._features: LRUCache[str, ImageFeatures] = LRUCache(capacity, getsizeof=lambda features: features.nbytes)
        self._in_progress: dict[str, Future[ImageFeatures]] = {}
        self._hits = 0
        self._misses = 0
        self._lock = threading.Lock()

    def get(self, key: str, encode: Callable[[], ImageFeatures], is_over: IsOver = never) -> tuple[ImageFeatures, bool]:
        """Return (features, True if `encode` was not called). An error of `encode` is raised in every thread that waits
        for the image, but if `encode` raises AbandonedError, the next thread encodes the image.

        Raises AbandonedError soon after `is_over` returns True while it waits for another thread."""
        while True:
            with self._lock:
                if key in self._features:
                    self._hits += 1
                    return self._features[key], True
                shared = self._in_progress.get(key)
                if shared is None:
                    own = self._in_progress[key] = Future()
            if shared is None:
                return self._encode(key, encode, own), False
            features = _wait(shared, is_over)
            if features is not None:
                with self._lock:
                    self._hits += 1
                return features, True

    def metrics(self) -> ImageCacheMetrics:
        with self._lock:
            return ImageCacheMetrics(self._hits, self._misses, len(self._features), int(self._features.currsize))

    def _encode(
        self, key: str, encode: Callable[[], ImageFeatures], in_progress: Future[ImageFeatures]
    ) -> ImageFeatures:
        try:
            features = encode()
        except BaseException as error:
            with self._lock:
                self._misses += 1
                del self._in_progress[key]
            in_progress.set_exception(error)
            raise
        with self._lock:
            self._misses += 1
            del self._in_progress[key]
            if features.nbytes <= self._features.maxsize:
                self._features[key] = features
        in_progress.set_result(features)
        return features


def _wait(shared: Future[ImageFeatures], is_over: IsOver) -> ImageFeatures | None:
    """Return what another thread encodes, or None if that thread has abandoned it."""
    while not wait([shared], _POLL_SECONDS).done:
        if is_over():
            raise AbandonedError
    try:
        return shared.result()
    except AbandonedError:
        return None
