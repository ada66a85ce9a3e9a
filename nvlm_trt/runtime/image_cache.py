"""Features of images seen before, so that a picture asked about twice is encoded once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from nvlm_trt.runtime.generation import ImageFeatures


@dataclass(frozen=True)
class ImageCacheMetrics:
    """A snapshot. `hits` and `misses` run from the start; a request that waits for another's encoding is a hit."""

    hits: int
    misses: int
    images: int
    nbytes: int


class ImageCache:
    """Least recently used first out, by bytes held. Thread-safe.

    Requests that need the same new image at once share one encoding.
    """

    def __init__(self, capacity: int) -> None:
        """`capacity` in bytes; 0 keeps nothing. Features larger than the capacity are not kept."""
        self._capacity = capacity
        self._features: OrderedDict[str, ImageFeatures] = OrderedDict()
        self._nbytes = 0
        self._in_progress: dict[str, Future[ImageFeatures]] = {}
        self._hits = 0
        self._misses = 0
        self._lock = threading.Lock()

    def get(self, key: str, encode: Callable[[], ImageFeatures]) -> tuple[ImageFeatures, bool]:
        """(features, whether `encode` was spared). Raises what `encode` raises, in every thread that waits for it."""
        with self._lock:
            if key in self._features:
                self._hits += 1
                self._features.move_to_end(key)
                return self._features[key], True
            shared = self._in_progress.get(key)
            if shared is None:
                own = self._in_progress[key] = Future()
        if shared is not None:
            features = shared.result()
            with self._lock:
                self._hits += 1
            return features, True
        return self._encode(key, encode, own), False

    def metrics(self) -> ImageCacheMetrics:
        with self._lock:
            return ImageCacheMetrics(self._hits, self._misses, len(self._features), self._nbytes)

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
            self._keep(key, features)
        in_progress.set_result(features)
        return features

    def _keep(self, key: str, features: ImageFeatures) -> None:
        if features.nbytes > self._capacity:
            return
        self._features[key] = features
        self._nbytes += features.nbytes
        while self._nbytes > self._capacity:
            _, oldest = self._features.popitem(last=False)
            self._nbytes -= oldest.nbytes
