"""Tests what may happen to requests besides an answer: cancellation at any stage, full queues, failures, the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_executor_answers import Opened, chat, make_image, tokens_of

from nvlm_trt.api import ChatRequest, Delta
from nvlm_trt.errors import EngineError, ParameterError, QueueFullError
from nvlm_trt.runtime.pipeline import Pipeline
from nvlm_trt.runtime.request import Request

WAIT = 30.0  # seconds until a test gives up


class Listener:
    """Collects one request's deltas and its error; nothing may follow the last."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.error: Exception | None = None
        self.started, self.done = threading.Event(), threading.Event()

    def on_delta(self, delta: Delta) -> None:
        assert not self.done.is_set()
        self.deltas.append(delta)
        self.started.set()
        if delta.finish_reason:
            self.done.set()

    def on_error(self, error: Exception) -> None:
        assert not self.done.is_set()
        self.error = error
        self.done.set()


def submit(pipeline: Pipeline, request: ChatRequest) -> tuple[Listener, Request]:
    listener = Listener()
    return listener, pipeline.submit(request, listener.on_delta, listener.on_error)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def long(text: str = "On and on.", *images: Any) -> ChatRequest:
    return chat(text, *images, max_tokens=400, ignore_eos=True)


# --- cancellation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nvlm-d-tiny", "nvlm-h-tiny"])
def test_cancelled_while_it_generates(opened: Opened, executors: list[Any], name: str) -> None:
    pipeline = opened(name)
    listener, request = submit(pipeline, long("What?", make_image(1)))
    assert listener.started.wait(WAIT)
    request.cancel()
    assert listener.done.wait(WAIT)
    last = listener.deltas[-1]
    assert (last.finish_reason, last.token_ids) == ("cancelled", [])
    assert last.usage is not None
    assert last.usage.completion_tokens == len(tokens_of(listener.deltas)) < 400
    assert executors[0].cancelled == [1]
    wait_until(lambda: pipeline.metrics().generator.free_slots == 3)
    assert pipeline.metrics().generator.requests_finished["cancelled"] == 1


def test_cancelled_between_two_chunks_of_its_prompt(
    opened: Opened, executors: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, executor = opened("nvlm-d-tiny"), executors[0]
    step = executor._step

    def one_chunk(active: list[Any]) -> list[Any]:
        executor.paused.set()
        responses: list[Any] = step(active)
        return responses

    monkeypatch.setattr(executor, "_step", one_chunk)
    listener, request = submit(pipeline, long("A long prompt. " * 25))
    wait_until(lambda: executor.steps == [(0, 40)])
    request.cancel()
    assert listener.done.wait(WAIT)  # the executor has not answered yet
    assert listener.deltas[-1].finish_reason == "cancelled"
    assert pipeline.metrics().generator.free_slots == 2
    executor.release()
    deltas = list(pipeline.generate(chat("Next.", max_tokens=3, ignore_eos=True)))
    assert len(tokens_of(deltas)) == 3
    wait_until(lambda: pipeline.metrics().generator.free_slots == 3)


def test_cancelled_while_it_waits_for_a_slot(opened: Opened, executors: list[Any]) -> None:
    """The executor never sees it, so that it need not wait there for a place to be cancelled."""
    pipeline = opened("nvlm-d-tiny")
    running = [submit(pipeline, long(f"{i}")) for i in range(3)]
    for listener, _ in running:
        assert listener.started.wait(WAIT)
    listener, request = submit(pipeline, chat("I wait."))
    assert pipeline.metrics().generator.queued == 1
    request.cancel()
    assert listener.done.wait(WAIT)
    assert listener.deltas[-1].usage is None
    assert len(executors[0].received) == 3
    assert all(not one.done.is_set() for one, _ in running)


def test_cancelled_while_its_image_is_encoded(
    opened: Opened, executors: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = opened("nvlm-h-tiny")
    entered, leave = threading.Event(), threading.Event()
    encode = pipeline._generator.encode

    def slow(pixels: Any) -> Any:
        entered.set()
        assert leave.wait(WAIT)
        return encode(pixels)

    monkeypatch.setattr(pipeline._generator, "encode", slow)
    listener, request = submit(pipeline, chat("What?", make_image(1)))
    assert entered.wait(WAIT)
    text, _ = submit(pipeline, chat("Text does not wait for images.", max_tokens=2))
    assert text.done.wait(WAIT)
    request.cancel()
    assert listener.done.wait(WAIT)
    leave.set()
    assert listener.deltas[-1].finish_reason == "cancelled"
    assert len(executors[0].received) == 1


def test_random_cancellations_leave_nothing_behind(opened: Opened, executors: list[Any]) -> None:
    pipeline = opened("nvlm-x-tiny", max_queue=40)
    random = np.random.default_rng(0)
    submitted = []
    for i in range(24):
        images = [make_image(i % 4)] if i % 2 else []
        submitted.append(submit(pipeline, chat(f"Number {i}.", *images, max_tokens=8, ignore_eos=True)))
        if random.random() < 0.5:
            time.sleep(random.random() * 0.03)
            submitted[random.integers(len(submitted))][1].cancel()
    for listener, _ in submitted:
        assert listener.done.wait(WAIT)
        assert listener.error is None
        assert len(tokens_of(listener.deltas)) == 8 or listener.deltas[-1].finish_reason == "cancelled"
    wait_until(lambda: pipeline.metrics().generator.free_slots == 3)
    metrics = pipeline.metrics().generator
    assert (metrics.queued, metrics.active, sum(metrics.requests_finished.values())) == (0, 0, 24)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses(opened: Opened) -> None:
    pipeline = opened("nvlm-d-tiny", max_queue=2)
    running = []
    for i in range(3):  # each has a slot before the next comes
        running.append(submit(pipeline, long(f"{i}")))
        assert running[-1][0].started.wait(WAIT)
    waiting = [submit(pipeline, long("I wait.")) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests are waiting and the queue holds 2"):
        submit(pipeline, long("Too many."))
    running[0][1].cancel()
    assert waiting[0][0].started.wait(WAIT)  # in the order of arrival
    assert not waiting[1][0].started.is_set()


def test_sampling_that_the_executor_cannot_follow_is_refused_on_arrival(opened: Opened, executors: list[Any]) -> None:
    """No tiny vocabulary has more than 1024 ids, so only one of the two refusals shows here."""
    with pytest.raises(ParameterError, match=r"top_p = 0\.9 and min_p = 0\.1 are not allowed together"):
        submit(opened("nvlm-d-tiny"), chat("No.", temperature=1.0, top_p=0.9, min_p=0.1))
    assert not executors[0].received


def test_a_callback_that_raises_drops_its_own_request_only(opened: Opened) -> None:
    pipeline = opened("nvlm-d-tiny")
    errors: list[Exception] = []

    def raise_(delta: Delta) -> None:
        raise ZeroDivisionError

    other, _ = submit(pipeline, chat("I go on.", max_tokens=30, ignore_eos=True))
    pipeline.submit(long("I fall."), raise_, errors.append)
    assert other.done.wait(WAIT)
    wait_until(lambda: bool(errors))
    assert isinstance(errors[0], ZeroDivisionError)
    assert len(tokens_of(other.deltas)) == 30


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_failed_step_ends_all_requests_with_one_error(opened: Opened, executors: list[Any]) -> None:
    pipeline = opened("nvlm-h-tiny")
    listeners = [submit(pipeline, long(f"{i}"))[0] for i in range(5)]  # two wait for a slot
    for listener in listeners[:3]:
        assert listener.started.wait(WAIT)
    executors[0].fail_with = "CUDA error: an illegal memory access was encountered"
    for listener in listeners:
        assert listener.done.wait(WAIT)
    errors = {str(listener.error) for listener in listeners}
    assert len(errors) == 1
    (error,) = errors
    assert error.startswith("the engine failed (Encountered an error in forwardAsync function: CUDA error")
    assert error.endswith("restart it")
    assert not pipeline.healthy
    with pytest.raises(EngineError, match="illegal memory access"):
        submit(pipeline, chat("Anyone?"))
    assert pipeline.metrics().generator.requests_finished["error"] == 5


def test_an_error_of_one_request_leaves_the_others(
    opened: Opened, executors: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = opened("nvlm-d-tiny")
    other, _ = submit(pipeline, long())
    assert other.started.wait(WAIT)
    executors[0].build["max_seq_len"] = 20  # the executor refuses what the manifest allows
    refused, _ = submit(pipeline, chat("Longer than twenty tokens.", max_tokens=5))
    assert refused.done.wait(WAIT)
    assert "TensorRT-LLM refused the request (Encountered an error when fetching new request" in str(refused.error)
    assert pipeline.healthy
    assert not other.done.is_set()


@pytest.mark.parametrize(("token_id", "is_allowed"), [(-1, False), (512, False), (259, False), (65, True)])
def test_an_id_that_is_no_text_is_an_error(
    opened: Opened, executors: list[Any], monkeypatch: pytest.MonkeyPatch, token_id: int, is_allowed: bool
) -> None:
    """259 is the image placeholder of the byte tokenizer; the executor is told to ban it."""
    pipeline = opened("nvlm-d-tiny")
    assert pipeline._engine.config.image_token_id == 259
    respond = executors[0]._response
    monkeypatch.setattr(
        executors[0], "_response", lambda number, ids, *rest: respond(number, [token_id for _ in ids], *rest)
    )
    listener, _ = submit(pipeline, chat("What?", max_tokens=1))
    assert listener.done.wait(WAIT)
    assert (listener.error is None) is is_allowed
    if not is_allowed:
        assert f"generated the id {token_id}" in str(listener.error)


@pytest.mark.parametrize(("reason", "ending"), [("LENGTH", "length"), ("END_ID", "stop"), ("TIMED_OUT", "error")])
def test_an_answer_that_the_executor_ends_by_itself(
    opened: Opened, executors: list[Any], monkeypatch: pytest.MonkeyPatch, reason: str, ending: str
) -> None:
    pipeline = opened("nvlm-d-tiny")
    listener, _ = submit(pipeline, long())
    assert listener.started.wait(WAIT)
    executor = executors[0]
    with executor._changed:
        executor._active.clear()
        executor._responses.append(executor._response(1, [], reason))
        executor._changed.notify_all()
    assert listener.done.wait(WAIT)
    found = "error" if listener.error else listener.deltas[-1].finish_reason
    assert found == ending
    assert pipeline.healthy
    assert pipeline.metrics().generator.free_slots == 3


# --- the end ---------------------------------------------------------------------------------------------------------


def test_closing_finishes_what_was_submitted(opened: Opened, executors: list[Any]) -> None:
    pipeline = opened("nvlm-h-tiny")
    listeners = [submit(pipeline, chat("What?", make_image(1), max_tokens=5, ignore_eos=True))[0] for _ in range(5)]
    pipeline.close()
    assert all(listener.deltas[-1].finish_reason == "length" for listener in listeners)
    assert executors[0].is_shut_down
    with pytest.raises(EngineError, match="closed"):
        submit(pipeline, chat("Late."))


def test_closing_without_drain_cancels(opened: Opened, executors: list[Any]) -> None:
    pipeline = opened("nvlm-d-tiny")
    listeners = [submit(pipeline, long(f"{i}"))[0] for i in range(5)]
    assert listeners[0].started.wait(WAIT)
    pipeline.close(drain=False)
    assert [listener.deltas[-1].finish_reason for listener in listeners] == ["cancelled"] * 5
    assert executors[0].is_shut_down
