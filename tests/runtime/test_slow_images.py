"""Tests that images which take a decoder long hold up no other request of the pipeline."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import pytest
from test_pipeline import WAIT, CountingEncoder, DirectoryByName, Listener, answer, chat, encoder, make_image

from lab.bombs import scans
from nvlm_trt.api import Delta
from nvlm_trt.errors import ImageError
from nvlm_trt.image.decoding import ImageLimits
from nvlm_trt.runtime.pipeline import Pipeline, RuntimeOptions
from nvlm_trt.runtime.request import Request

__all__ = ["encoder"]  # a fixture

# decoding one takes as long as anybody lets it
BOMB = scans(count=20_000)


@pytest.fixture
def patient(engine: DirectoryByName) -> Iterator[Pipeline]:
    """NVLM-H with one decoder of each kind, which has a thousand seconds for each image."""
    limits = ImageLimits(max_images=40, max_decode_seconds=1000)
    options = RuntimeOptions(image_limits=limits, decode_workers=1, max_queue=64)
    with Pipeline.open(engine("nvlm-h-tiny"), threads=1, options=options) as opened:
        yield opened


def submit_bombs(pipeline: Pipeline, count: int) -> list[tuple[Request, Listener]]:
    submitted = []
    for seed in range(count):
        listener = Listener()
        request = chat("Look.", BOMB + seed.to_bytes(4, "big"))
        submitted.append((pipeline.submit(request, listener.on_delta, listener.on_error), listener))
    return submitted


def cancel(submitted: list[tuple[Request, Listener]]) -> None:
    for request, _ in submitted:
        request.cancel()
    assert all(listener.done.wait(WAIT) for _, listener in submitted)


def test_no_other_request_waits_for_images_that_decode_for_ever(patient: Pipeline) -> None:
    known = chat("Look.", make_image(1))
    assert answer(patient, known)[2].cached_images == 0
    bombs = submit_bombs(patient, 20)
    try:
        assert answer(patient, known)[2].cached_images == 1
        assert answer(patient, chat("Hello."))[0]
        assert answer(patient, chat("Look.", make_image(2)))[2].cached_images == 0
        assert answer(patient, chat("Look <image> <image>", make_image(1), make_image(2)))[2].cached_images == 2
        assert not any(listener.done.is_set() for _, listener in bombs)
    finally:
        cancel(bombs)


def test_cancelling_ends_the_decoding(patient: Pipeline) -> None:
    cancel(submit_bombs(patient, 3))
    deadline = time.monotonic() + WAIT
    while decoding := [thread.name for thread in threading.enumerate() if in_a_turn(thread)]:
        assert time.monotonic() < deadline, decoding
        time.sleep(0.01)
    assert answer(patient, chat("Look.", make_image(3)))[0]


def in_a_turn(thread: threading.Thread) -> bool:
    """Returns whether the thread prepares the images of a request."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if frame.f_code.co_name == "_encode_images":
            return True
        frame = frame.f_back
    return False


def test_requests_take_turns(engine: DirectoryByName, encoder: CountingEncoder) -> None:
    """A request with one image does not wait for all images of one that came before."""
    started, may_go_on = threading.Event(), threading.Event()

    def hold_the_first() -> None:
        started.set()
        assert may_go_on.wait(WAIT)

    encoder.calls, encoder.before = 0, hold_the_first
    order: list[str] = []
    options = RuntimeOptions(image_limits=ImageLimits(max_images=40), decode_workers=1)
    many = chat("Look.", *(make_image(100 + seed, 56, 56) for seed in range(20)), max_tiles=1)
    one = chat("Look.", make_image(99, 56, 56), max_tiles=1)
    path = engine("nvlm-h-tiny")
    with Pipeline.open(path, threads=1, encode_tiles=encoder, options=options) as pipeline:
        listeners = {"many": Listener(), "one": Listener()}
        for (name, listener), request in zip(listeners.items(), (many, one), strict=True):

            def note(delta: Delta, name: str = name, listener: Listener = listener) -> None:
                if not listener.deltas:
                    order.append(name)
                listener.on_delta(delta)

            pipeline.submit(request, note, listener.on_error)
            assert started.wait(WAIT)
        may_go_on.set()
        assert all(listener.done.wait(WAIT) for listener in listeners.values())
    assert [listener.error for listener in listeners.values()] == [None, None]
    assert order == ["one", "many"]


def test_an_image_over_its_budget_is_named(engine: DirectoryByName) -> None:
    options = RuntimeOptions(image_limits=ImageLimits(max_decode_seconds=0.3))
    with Pipeline.open(engine("nvlm-h-tiny"), threads=1, options=options) as pipeline:
        with pytest.raises(ImageError, match=r"^image 2: decoding took more than 0.3 s of CPU time; .*") as caught:
            answer(pipeline, chat("Compare.", make_image(1), BOMB))
        assert "\n" not in str(caught.value)
        assert answer(pipeline, chat("Look.", make_image(1)))[2].cached_images == 1
