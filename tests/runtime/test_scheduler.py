from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_backend import POISON, Asked, Receiver, ToyBackend, ask, byte_tokenizer, tokens_alone

from nvlm_trt.api import SamplingParams
from nvlm_trt.errors import EngineError, ImageError, QueueFullError, RequestError
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.request import Request
from nvlm_trt.runtime.scheduler import Scheduler


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return byte_tokenizer(directory)


@dataclass
class Client:
    """One request of a schedule, and the steps at which it arrives, becomes ready and is cancelled."""

    asked: Asked
    arrives: int = 0
    prepared_after: int = 0
    cancelled_after: int | None = None
    receiver: Receiver = field(default_factory=Receiver)
    rejected: bool = False

    def __post_init__(self) -> None:
        self.request: Request = self.asked.request(self.receiver, ready=False)

    def provide(self) -> None:
        self.asked.provide(self.request)


def submit(scheduler: Scheduler, asked: Asked) -> Client:
    client = Client(asked)
    client.provide()
    scheduler.enqueue(client.request)
    return client


def run(scheduler: Scheduler) -> None:
    while scheduler.has_work:
        scheduler.step()


@st.composite
def clients(draw: st.DrawFn, image_token_id: int) -> list[Client]:
    schedule = []
    for index in range(draw(st.integers(1, 9))):
        sampling = SamplingParams(
            max_tokens=draw(st.integers(1, 12)),
            temperature=draw(st.sampled_from([0.0, 1.0])),
            seed=index,
            repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
            ignore_eos=draw(st.booleans()),
        )
        asked = ask(
            image_token_id,
            seed=draw(st.integers(0, 99)),
            length=draw(st.integers(8, 45)),
            images=draw(st.integers(0, 3)),
            sampling=sampling,
            first_token=100 + index,
        )
        cancelled_after = draw(st.one_of(st.none(), st.integers(0, 12)))
        schedule.append(Client(asked, draw(st.integers(0, 12)), draw(st.sampled_from([0, 0, 1, 5])), cancelled_after))
    return sorted(schedule, key=lambda client: client.arrives)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_schedule_gives_each_request_its_own_tokens(tokenizer: Tokenizer, data: st.DataObject) -> None:
    slots, chunk, max_queue = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 20)), data.draw(st.integers(1, 9))
    backend = ToyBackend(tokenizer.image_token_id, max_slots=slots)
    scheduler = Scheduler(backend, tokenizer, max_queue, chunk)
    schedule = data.draw(clients(tokenizer.image_token_id))

    for now in range(2000):
        for client in schedule:
            if client.arrives == now:
                full = scheduler.metrics().queued == max_queue
                try:
                    scheduler.enqueue(client.request)
                except QueueFullError:
                    client.rejected = True
                assert client.rejected == full
            if client.arrives + client.prepared_after == now:
                client.provide()
            if client.cancelled_after is not None and client.arrives + client.cancelled_after == now:
                client.request.cancel()
        decoding = scheduler.metrics().active
        backend.calls.clear()
        scheduler.step()

        # one step: one chunk at most, and one token of everything that was being decoded and was not cancelled
        kinds = [kind for kind, _ in backend.calls]
        assert kinds in ([], ["prefill"], ["decode"], ["prefill", "decode"])
        assert all(size <= (chunk if kind == "prefill" else slots) for kind, size in backend.calls)
        stays = decoding - sum(client.request.cancelled for client in schedule)
        assert stays <= 0 or kinds[-1] == "decode"
        metrics = scheduler.metrics()
        assert metrics.queued <= max_queue
        assert 0 <= metrics.free_slots <= slots - metrics.active
        for client in schedule:
            assert client.receiver.ended or not client.request.cancelled or client.rejected
        if now > 20 and scheduler.is_empty:
            break

    assert scheduler.is_empty
    assert scheduler.metrics().free_slots == slots
    for client in schedule:
        alone = tokens_alone(backend, tokenizer, client.asked)
        got, reason = client.receiver.token_ids, client.receiver.finish_reason
        assert client.receiver.error is None
        if client.rejected:
            assert not client.receiver.ended
        elif reason == "cancelled":
            assert client.request.cancelled
            assert got == alone[: len(got)]
        else:
            assert got == alone
            ended = alone[-1] in tokenizer.stop_ids and not client.asked.sampling.ignore_eos
            assert reason == ("stop" if ended else "length")
            assert client.receiver.text == tokenizer.decode(got)
    served = [client for client in schedule if not client.rejected]
    assert sum(scheduler.metrics().requests_finished.values()) == len(served)
    assert scheduler.metrics().tokens_generated == sum(len(client.receiver.token_ids) for client in served)


def test_slots_are_given_in_the_order_of_arrival(tokenizer: Tokenizer) -> None:
    backend = ToyBackend(tokenizer.image_token_id, max_slots=2)
    scheduler = Scheduler(backend, tokenizer, max_queue=20, prefill_chunk=5)
    for index in range(9):
        submit(scheduler, ask(tokenizer.image_token_id, index, length=8 + index, first_token=100 + index))
    run(scheduler)
    assert backend.admitted == list(range(100, 109))


def test_a_request_whose_images_are_being_encoded_does_not_hold_up_those_behind_it(tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(ToyBackend(tokenizer.image_token_id, max_slots=1), tokenizer, 20, 64)
    slow = Client(ask(tokenizer.image_token_id, 0))
    scheduler.enqueue(slow.request)
    assert not scheduler.has_work
    quick = submit(scheduler, ask(tokenizer.image_token_id, 1))
    run(scheduler)
    assert quick.receiver.ended
    assert not slow.receiver.ended
    slow.provide()
    run(scheduler)
    assert slow.receiver.ended


def test_a_full_queue_says_how_full(tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(ToyBackend(tokenizer.image_token_id), tokenizer, max_queue=2, prefill_chunk=8)
    for seed in range(2):
        submit(scheduler, ask(tokenizer.image_token_id, seed))
    with pytest.raises(QueueFullError, match=r"^2 requests are waiting and the queue holds 2; try again later$"):
        submit(scheduler, ask(tokenizer.image_token_id, 2))


def test_only_rows_that_stay_are_moved(tokenizer: Tokenizer) -> None:
    backend = ToyBackend(tokenizer.image_token_id, max_slots=4)
    scheduler = Scheduler(backend, tokenizer, max_queue=8, prefill_chunk=64)
    together = [
        submit(scheduler, ask(tokenizer.image_token_id, i, sampling=SamplingParams(max_tokens=n, ignore_eos=True)))
        for i, n in enumerate([9, 8, 20, 6])  # the first, second and fourth end in the same step
    ]
    run(scheduler)
    assert all(client.receiver.finish_reason == "length" for client in together)
    assert backend.moves == 1


def test_decoding_waits_for_one_chunk_at_most(tokenizer: Tokenizer) -> None:
    backend = ToyBackend(tokenizer.image_token_id, max_slots=2)
    scheduler = Scheduler(backend, tokenizer, max_queue=20, prefill_chunk=4)
    sampling = SamplingParams(max_tokens=40, ignore_eos=True)
    submit(scheduler, ask(tokenizer.image_token_id, 0, length=8, sampling=sampling))
    scheduler.step()
    scheduler.step()
    backend.calls.clear()
    submit(scheduler, ask(tokenizer.image_token_id, 1, length=40, sampling=SamplingParams(max_tokens=1)))
    run(scheduler)
    kinds = ["".join(kind[0] for kind, _ in group) for _, group in groupby(backend.calls, key=lambda call: call[0])]
    assert kinds == ["p", "d"] * 9 + ["p", "d" * 29]  # 10 chunks, 38 tokens that were still to come


def test_the_answer_ends_where_the_engine_is_full(tokenizer: Tokenizer) -> None:
    backend = ToyBackend(tokenizer.image_token_id, max_seq_len=32)
    scheduler = Scheduler(backend, tokenizer, 4, 256)
    sampling = SamplingParams(max_tokens=1000, ignore_eos=True)
    client = submit(scheduler, ask(tokenizer.image_token_id, 0, length=30, sampling=sampling))
    full = submit(scheduler, ask(tokenizer.image_token_id, 1, length=32, sampling=sampling))
    run(scheduler)
    assert (len(client.receiver.token_ids), client.receiver.finish_reason) == (2, "length")
    assert isinstance(full.receiver.error, RequestError)
    assert "32 tokens (0 of images), the engine holds 32" in str(full.receiver.error)


def test_a_stop_string_ends_the_answer_and_is_not_shown(tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(ToyBackend(tokenizer.image_token_id), tokenizer, 4, 256)
    everything = SamplingParams(max_tokens=40, ignore_eos=True)
    whole = submit(scheduler, ask(tokenizer.image_token_id, 3, sampling=everything))
    run(scheduler)
    stop = whole.receiver.text[5:8]
    cut = submit(
        scheduler,
        ask(tokenizer.image_token_id, 3, sampling=SamplingParams(max_tokens=40, ignore_eos=True, stop=(stop,))),
    )
    run(scheduler)
    assert cut.receiver.finish_reason == "stop"
    assert cut.receiver.text == whole.receiver.text[: whole.receiver.text.index(stop)]
    assert cut.receiver.token_ids == whole.receiver.token_ids[: len(cut.receiver.token_ids)]


def test_logits_that_are_not_finite_end_only_their_own_request(tokenizer: Tokenizer) -> None:
    backend = ToyBackend(tokenizer.image_token_id)
    scheduler = Scheduler(backend, tokenizer, 8, 256)
    sampling = SamplingParams(max_tokens=15, ignore_eos=True)
    token = tokenizer.image_token_id
    before = submit(scheduler, ask(token, 0, sampling=sampling))
    poisoned = submit(scheduler, ask(token, 1, sampling=sampling, first_token=POISON))
    after = submit(scheduler, ask(token, 2, sampling=sampling))
    run(scheduler)
    assert isinstance(poisoned.receiver.error, EngineError)
    assert len(poisoned.receiver.token_ids) == 10  # 10 of the prompt, then up to the 20th cached
    for client in (before, after):
        assert client.receiver.token_ids == tokens_alone(backend, tokenizer, client.asked)
    assert scheduler.metrics().free_slots == 3
    assert scheduler.metrics().requests_finished == {"stop": 0, "length": 2, "cancelled": 0, "error": 1}


def test_a_request_that_the_backend_refuses_ends_alone(tokenizer: Tokenizer) -> None:
    backend = ToyBackend(tokenizer.image_token_id)
    scheduler = Scheduler(backend, tokenizer, 8, 256)
    running = submit(scheduler, ask(tokenizer.image_token_id, 0, sampling=SamplingParams(max_tokens=9)))
    scheduler.step()
    refused = submit(scheduler, ask(tokenizer.image_token_id, 1))
    backend.refuse_prefill = RequestError("too long")
    scheduler.step()
    assert refused.receiver.error is backend.refuse_prefill
    backend.refuse_prefill = None
    run(scheduler)
    assert running.receiver.token_ids == tokens_alone(backend, tokenizer, running.asked)
    assert scheduler.metrics().free_slots == 3


def test_callbacks_that_raise_end_only_their_own_request(tokenizer: Tokenizer) -> None:
    backend = ToyBackend(tokenizer.image_token_id)
    scheduler = Scheduler(backend, tokenizer, 8, 256)
    sampling = SamplingParams(max_tokens=15, ignore_eos=True)
    good = submit(scheduler, ask(tokenizer.image_token_id, 0, sampling=sampling))
    errors = []

    def raise_at_once(_: object) -> None:
        raise ValueError("a bug of the caller")

    def note_and_raise(error: Exception) -> None:
        errors.append(error)
        raise ValueError("another one")

    for seed, most in ((1, 15), (2, 1)):
        asked = ask(tokenizer.image_token_id, seed, sampling=SamplingParams(max_tokens=most))
        bad = Request(asked.sampling, raise_at_once, note_and_raise)
        asked.provide(bad)
        scheduler.enqueue(bad)
    run(scheduler)
    assert good.receiver.token_ids == tokens_alone(backend, tokenizer, good.asked)
    assert [str(error) for error in errors] == ["a bug of the caller"]  # the other's only delta was its last
    assert scheduler.metrics().free_slots == 3


def test_a_request_whose_images_fail_is_told_while_all_slots_are_taken(tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(ToyBackend(tokenizer.image_token_id, max_slots=1), tokenizer, 8, 256)
    busy = submit(scheduler, ask(tokenizer.image_token_id, 0, sampling=SamplingParams(ignore_eos=True)))
    scheduler.step()
    failing = Client(ask(tokenizer.image_token_id, 1))
    scheduler.enqueue(failing.request)
    failing.request.fail(ImageError("not an image"))
    scheduler.step()
    assert isinstance(failing.receiver.error, ImageError)
    assert not busy.receiver.ended


def test_images_may_fail_at_any_moment_of_a_step(tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(ToyBackend(tokenizer.image_token_id), tokenizer, 8, 256)
    first, second = (Client(ask(tokenizer.image_token_id, seed)) for seed in range(2))

    def fail_second(error: Exception) -> None:
        second.request.fail(ImageError("not an image either"))

    first.request.on_error = fail_second
    scheduler.enqueue(first.request)
    scheduler.enqueue(second.request)
    first.request.fail(ImageError("not an image"))
    run(scheduler)
    assert str(second.receiver.error) == "not an image either"
    assert scheduler.metrics().requests_finished["error"] == 2


def test_cancelling_cancels_the_encoding_of_the_images(tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(ToyBackend(tokenizer.image_token_id), tokenizer, 8, 256)
    client = Client(ask(tokenizer.image_token_id, 0))
    scheduler.enqueue(client.request)
    client.request.cancel()
    client.request.cancel()
    assert scheduler.has_work
    scheduler.step()
    assert client.request.is_over
    assert client.receiver.finish_reason == "cancelled"
    assert scheduler.is_empty
