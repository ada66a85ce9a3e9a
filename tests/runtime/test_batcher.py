"""Tests the batcher's thread: sleeping, waking, failing, closing. test_scheduler.py tests the scheduling."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import numpy as np
import pytest
from toy_backend import Asked, Receiver, ToyBackend, ask, byte_tokenizer, tokens_alone

from nvlm_trt.api import Delta, SamplingParams
from nvlm_trt.errors import EngineError, QueueFullError
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.batcher import Batcher
from nvlm_trt.runtime.request import Request

LONG = SamplingParams(max_tokens=10_000, ignore_eos=True)
WAIT = 30.0  # seconds until a test gives up


class Listener(Receiver):
    """A receiver with a method that waits for its end."""

    def __init__(self) -> None:
        super().__init__()
        self.started, self.done = threading.Event(), threading.Event()

    def on_delta(self, delta: Delta) -> None:
        super().on_delta(delta)
        self.started.set()
        if self.ended:
            self.done.set()

    def on_error(self, error: Exception) -> None:
        super().on_error(error)
        self.done.set()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return byte_tokenizer(directory)


def submit(batcher: Batcher, asked: Asked, ready: bool = True) -> tuple[Listener, Request]:
    """Submits a request. Unless `ready`, its images are still being encoded."""
    listener = Listener()
    request = asked.request(listener, ready)
    batcher.submit(request)
    return listener, request


def test_requests_from_many_threads_get_their_own_tokens(tokenizer: Tokenizer) -> None:
    backend = ToyBackend(tokenizer.image_token_id, max_slots=4)
    batcher = Batcher(backend, tokenizer, max_queue=100, prefill_chunk=7)
    token = tokenizer.image_token_id
    asked = [
        ask(token, i, length=8 + i, images=i % 3, sampling=SamplingParams(max_tokens=12, temperature=1, seed=i))
        for i in range(24)
    ]
    results: dict[int, tuple[Listener, bool]] = {}

    def client(index: int) -> None:
        listener, request = submit(batcher, asked[index])
        if index % 4 == 3:
            if random.random() < 0.5:
                listener.started.wait(WAIT)
            request.cancel()
        results[index] = listener, request.cancelled

    threads = [threading.Thread(target=client, args=(index,)) for index in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    batcher.close()
    for index, (listener, cancelled) in results.items():
        alone = tokens_alone(backend, tokenizer, asked[index])
        assert listener.done.is_set()
        assert listener.error is None
        if cancelled and listener.finish_reason == "cancelled":
            assert listener.token_ids == alone[: len(listener.token_ids)]
        else:
            assert listener.token_ids == alone
    metrics = batcher.metrics()
    assert (metrics.queued, metrics.active, metrics.free_slots) == (0, 0, 4)
    assert sum(metrics.requests_finished.values()) == len(asked)


def test_cancelling_frees_the_slot_before_the_caller_is_told(tokenizer: Tokenizer) -> None:
    batcher = Batcher(ToyBackend(tokenizer.image_token_id, max_slots=1, max_seq_len=10_000), tokenizer)
    free: list[int] = []
    listener = Listener()

    def on_delta(delta: Delta) -> None:
        if delta.finish_reason:
            free.append(batcher.metrics().free_slots)
        listener.on_delta(delta)

    asked = ask(tokenizer.image_token_id, 0, sampling=LONG)
    request = Request(asked.sampling, on_delta, listener.on_error)
    asked.provide(request)
    batcher.submit(request)
    assert listener.started.wait(WAIT)
    request.cancel()
    assert listener.done.wait(WAIT)
    assert listener.finish_reason == "cancelled"
    assert free == [1]
    batcher.close()


def test_a_callback_may_cancel_its_own_request(tokenizer: Tokenizer) -> None:
    batcher = Batcher(ToyBackend(tokenizer.image_token_id, max_seq_len=10_000), tokenizer)
    listener = Listener()

    def on_delta(delta: Delta) -> None:
        listener.on_delta(delta)
        request.cancel()

    asked = ask(tokenizer.image_token_id, 0, sampling=LONG)
    request = Request(asked.sampling, on_delta, listener.on_error)
    asked.provide(request)
    batcher.submit(request)
    assert listener.done.wait(WAIT)
    # the first token comes with prefill, the second with the same step's decoding; the next step ends it
    assert len(listener.token_ids) == 2
    batcher.close()


def test_a_request_that_becomes_ready_wakes_the_thread(tokenizer: Tokenizer) -> None:
    batcher = Batcher(ToyBackend(tokenizer.image_token_id), tokenizer)
    asked = ask(tokenizer.image_token_id, 0)
    listener, request = submit(batcher, asked, ready=False)
    assert batcher.metrics().queued == 1
    asked.provide(request)
    assert listener.done.wait(WAIT)
    assert listener.finish_reason in ("stop", "length")
    batcher.close()


def test_cancelling_a_request_that_is_not_ready_wakes_the_thread(tokenizer: Tokenizer) -> None:
    batcher = Batcher(ToyBackend(tokenizer.image_token_id), tokenizer)
    listener, request = submit(batcher, ask(tokenizer.image_token_id, 0), ready=False)
    request.cancel()
    assert listener.done.wait(WAIT)
    assert (listener.finish_reason, listener.usage) == ("cancelled", None)
    assert request.is_over
    batcher.close()


def test_a_failing_backend_ends_every_request_and_is_unhealthy(tokenizer: Tokenizer) -> None:
    backend = ToyBackend(tokenizer.image_token_id, max_slots=1, max_seq_len=10_000)
    batcher = Batcher(backend, tokenizer)
    active, _ = submit(batcher, ask(tokenizer.image_token_id, 0, sampling=LONG))
    assert active.started.wait(WAIT)
    queued, _ = submit(batcher, ask(tokenizer.image_token_id, 1))
    waiting, encoding = submit(batcher, ask(tokenizer.image_token_id, 3), ready=False)
    assert batcher.healthy
    backend.fail_with = RuntimeError("out of memory")
    for listener in (active, queued, waiting):
        assert listener.done.wait(WAIT)
        assert isinstance(listener.error, EngineError)
        assert str(listener.error) == "the engine failed (out of memory); restart it"
    assert not batcher.healthy
    assert encoding.is_over
    with pytest.raises(EngineError, match="out of memory"):
        submit(batcher, ask(tokenizer.image_token_id, 2))
    assert batcher.metrics().requests_finished["error"] == 3
    batcher.close()


def test_the_queue_is_bounded(tokenizer: Tokenizer) -> None:
    batcher = Batcher(ToyBackend(tokenizer.image_token_id, max_slots=1, max_seq_len=10_000), tokenizer, max_queue=2)
    active, request = submit(batcher, ask(tokenizer.image_token_id, 0, sampling=LONG))
    assert active.started.wait(WAIT)
    queued = [submit(batcher, ask(tokenizer.image_token_id, seed))[0] for seed in (1, 2)]
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        submit(batcher, ask(tokenizer.image_token_id, 3))
    request.cancel()
    batcher.close()
    assert all(listener.finish_reason in ("stop", "length") for listener in queued)


def test_close_drains_or_cancels(tokenizer: Tokenizer) -> None:
    for drain in (True, False):
        batcher = Batcher(ToyBackend(tokenizer.image_token_id, max_slots=1, max_seq_len=200), tokenizer)
        listeners = [submit(batcher, ask(tokenizer.image_token_id, i, sampling=LONG))[0] for i in range(3)]
        if not drain:
            listeners.append(submit(batcher, ask(tokenizer.image_token_id, 3), ready=False)[0])
        batcher.close(drain)
        batcher.close(drain)
        expected = {"length"} if drain else {"cancelled"}
        assert {listener.finish_reason for listener in listeners[1:]} == expected
        with pytest.raises(EngineError, match="closed"):
            submit(batcher, ask(tokenizer.image_token_id, 9))


def test_usage_counts_what_the_request_took(tokenizer: Tokenizer) -> None:
    batcher = Batcher(ToyBackend(tokenizer.image_token_id), tokenizer)
    asked = ask(tokenizer.image_token_id, 5, images=2, sampling=SamplingParams(max_tokens=4, ignore_eos=True))
    listener, _ = submit(batcher, asked)
    assert listener.done.wait(WAIT)
    usage = listener.usage
    assert usage.prompt_tokens == len(asked.prompt.input_ids)  # type: ignore[attr-defined]
    assert usage.completion_tokens == 4  # type: ignore[attr-defined]
    assert usage.image_tiles == 4  # type: ignore[attr-defined]
    assert usage.cross_tokens == asked.prompt.cross_tokens  # type: ignore[attr-defined]
    assert 0 <= usage.queue_s <= usage.ttft_s <= usage.total_s  # type: ignore[attr-defined]
    batcher.close()


def test_logprobs_come_with_their_tokens(tokenizer: Tokenizer) -> None:
    batcher = Batcher(ToyBackend(tokenizer.image_token_id), tokenizer)
    deltas: list[Delta] = []
    done = threading.Event()

    def on_delta(delta: Delta) -> None:
        deltas.append(delta)
        if delta.finish_reason:
            done.set()

    sampling = SamplingParams(max_tokens=5, ignore_eos=True, logprobs=3)
    asked = ask(tokenizer.image_token_id, 0, sampling=sampling)
    request = Request(asked.sampling, on_delta, print)
    asked.provide(request)
    batcher.submit(request)
    assert done.wait(WAIT)
    batcher.close()
    assert [[info.token_id for info in delta.logprobs] for delta in deltas] == [delta.token_ids for delta in deltas]
    assert all(len(info.top) == 3 and np.isfinite(info.logprob) for delta in deltas for info in delta.logprobs)
