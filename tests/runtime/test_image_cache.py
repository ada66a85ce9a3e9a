from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvlm_trt.backends.base import ImageFeatures
from nvlm_trt.errors import ImageError
from nvlm_trt.lane import AbandonedError
from nvlm_trt.runtime.image_cache import ImageCache


def features(numbers: int, in_cross: int = 0) -> ImageFeatures:
    """4 bytes per number."""
    cross_kv = np.zeros((1, 1, 1, in_cross, 1), np.float32) if in_cross else None
    return ImageFeatures(np.zeros((numbers, 1), np.float32), cross_kv, tiles=1)


def holds(cache: ImageCache, key: str) -> bool:
    """Returns whether the cache holds the key, without inserting anything."""
    try:
        cache.get(key, lambda: (_ for _ in ()).throw(LookupError()))
    except LookupError:
        return False
    return True


@given(
    capacity=st.integers(0, 60),
    asked=st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 12)), max_size=30),
)
def test_it_is_a_least_recently_used_cache_by_bytes(capacity: int, asked: list[tuple[str, int]]) -> None:
    cache, model = ImageCache(capacity), {}  # the model: key -> bytes, the least recently used first
    hits = 0
    for count, (key, numbers) in enumerate(asked, start=1):
        got, was_cached = cache.get(key, lambda numbers=numbers: features(numbers))  # type: ignore[misc]
        assert was_cached == (key in model)
        hits += was_cached
        nbytes = model.pop(key, 4 * numbers)
        assert got.nbytes == nbytes
        if nbytes <= capacity:
            model[key] = nbytes
        while sum(model.values()) > capacity:
            del model[next(iter(model))]
        metrics = cache.metrics()
        assert (metrics.images, metrics.nbytes) == (len(model), sum(model.values()))
        assert (metrics.hits, metrics.misses) == (hits, count - hits)


def test_bytes_of_keys_and_values_count() -> None:
    assert features(3, in_cross=5).nbytes == 32
    cache = ImageCache(31)
    cache.get("a", lambda: features(3, in_cross=5))
    assert not holds(cache, "a")


def test_requests_for_the_same_image_share_one_encoding() -> None:
    cache = ImageCache(1000)
    calls = []
    first_runs, may_end = threading.Event(), threading.Event()

    def encode() -> ImageFeatures:
        calls.append(1)
        first_runs.set()
        assert may_end.wait(30)
        return features(1)

    with ThreadPoolExecutor(4) as pool:
        leader = pool.submit(cache.get, "a", encode)
        assert first_runs.wait(30)
        followers = [pool.submit(cache.get, "a", encode) for _ in range(3)]
        other, _ = cache.get("b", lambda: features(2))  # is not held up
        may_end.set()
        results = [future.result(30) for future in (leader, *followers)]
    assert len(calls) == 1
    assert other.nbytes == 8
    assert all(got is results[0][0] for got, _ in results)
    assert [was_cached for _, was_cached in results] == [False, True, True, True]
    assert (cache.metrics().hits, cache.metrics().misses) == (3, 2)


def test_a_failed_encoding_reaches_everyone_who_waits_and_is_not_kept() -> None:
    cache = ImageCache(1000)
    first_runs, may_end = threading.Event(), threading.Event()

    def fail() -> ImageFeatures:
        first_runs.set()
        assert may_end.wait(30)
        raise ImageError("not an image")

    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(cache.get, "a", fail)]
        assert first_runs.wait(30)
        futures += [pool.submit(cache.get, "a", fail) for _ in range(2)]
        may_end.set()
        for future in futures:
            with pytest.raises(ImageError, match="not an image"):
                future.result(30)
    got, was_cached = cache.get("a", lambda: features(1))
    assert (got.nbytes, was_cached) == (4, False)


def test_an_abandoned_encoding_is_taken_over_by_the_next_who_waits() -> None:
    cache = ImageCache(1000)
    first_runs, may_end = threading.Event(), threading.Event()

    def abandon() -> ImageFeatures:
        first_runs.set()
        assert may_end.wait(30)
        raise AbandonedError

    with ThreadPoolExecutor(3) as pool:
        leader = pool.submit(cache.get, "a", abandon)
        assert first_runs.wait(30)
        followers = [pool.submit(cache.get, "a", lambda: features(1)) for _ in range(2)]
        may_end.set()
        with pytest.raises(AbandonedError):
            leader.result(30)
        results = [future.result(30) for future in followers]
    assert all(got is results[0][0] for got, _ in results)
    assert sorted(was_cached for _, was_cached in results) == [False, True]


def test_who_waits_for_another_can_give_up() -> None:
    cache = ImageCache(1000)
    first_runs, may_end, over = threading.Event(), threading.Event(), threading.Event()

    def encode() -> ImageFeatures:
        first_runs.set()
        assert may_end.wait(30)
        return features(1)

    with ThreadPoolExecutor(2) as pool:
        leader = pool.submit(cache.get, "a", encode)
        assert first_runs.wait(30)
        follower = pool.submit(cache.get, "a", encode, over.is_set)
        over.set()
        with pytest.raises(AbandonedError):
            follower.result(30)
        assert not leader.done()
        may_end.set()
        assert leader.result(30)[1] is False
