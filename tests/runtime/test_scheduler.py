from __future__ import annotations

import dataclasses
import gc
import weakref
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_backend import (
    CONFIG,
    POISON,
    Asked,
    Receiver,
    ToyBackend,
    ask,
    byte_tokenizer,
    follow_up,
    tokens_alone,
    with_other_image,
)

from nvlm_trt.api import SamplingParams
from nvlm_trt.errors import EngineError, ImageError, ParameterError, QueueFullError, RequestError
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
    receiver: Receiver = field(init=False)
    rejected: bool = False

    def __post_init__(self) -> None:
        self.receiver = Receiver(self.asked.sampling.n)
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
def clients(draw: st.DrawFn, image_token_id: int, slots: int) -> list[Client]:
    schedule = []
    for index in range(draw(st.integers(1, 9))):
        max_tokens = draw(st.integers(1, 18))
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=draw(st.sampled_from([0.0, 1.0])),
            seed=index,
            repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
            presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.5])),
            frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.5])),
            # two letters only: their words repeat, so drafts are right now and then
            logit_bias=draw(
                st.one_of(
                    st.dictionaries(st.integers(60, 260), st.sampled_from([-100, 2]), max_size=3),
                    st.just({65: 100, 66: 99}),
                )
            ),
            draft_tokens=draw(st.sampled_from([0, 1, 5])),
            min_tokens=draw(st.sampled_from([0, 0, max_tokens])),
            n=draw(st.integers(1, slots)),
            ignore_eos=draw(st.booleans()),
            priority=draw(st.sampled_from([0, 0, 0, -1, 1])),
        )
        relation = draw(st.sampled_from(["new", "follows", "other image"])) if schedule else "new"
        earlier = draw(st.sampled_from(schedule)).asked if schedule else None
        if earlier and relation == "follows":
            kept = draw(st.integers(1, len(earlier.prompt.input_ids)))
            asked = follow_up(earlier, kept, seed=index, length=draw(st.integers(1, 9)), sampling=sampling)
        elif earlier and relation == "other image" and earlier.images:
            other = with_other_image(earlier, draw(st.integers(0, len(earlier.images) - 1)))
            asked = dataclasses.replace(other, sampling=sampling)
        else:
            asked = ask(
                image_token_id,
                seed=draw(st.integers(0, 99)),
                length=draw(st.integers(8, 40)),
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
    schedule = data.draw(clients(tokenizer.image_token_id, slots))
    prefilled = 0

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
        checks = kinds.count("score")
        assert checks <= scheduler.metrics().active + decoding
        assert kinds[len(kinds) - checks :] == ["score"] * checks
        assert not checks or "decode" in kinds
        kinds = kinds[: len(kinds) - checks]
        assert kinds in ([], ["prefill"], ["decode"], ["prefill", "decode"])
        most = {"prefill": chunk, "decode": slots, "score": 6}
        assert all(size <= most[kind] for kind, size in backend.calls)
        prefilled += sum(size for kind, size in backend.calls if kind == "prefill")
        stays = decoding - sum(client.request.sampling.n for client in schedule if client.request.cancelled)
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
        assert client.receiver.error is None
        assert client.receiver.ended != client.rejected
        if not client.rejected:
            check_answers(backend, tokenizer, client)
    served = [client for client in schedule if not client.rejected]
    generated = {client.request: sum(map(len, client.receiver.tokens)) for client in served}
    assert sum(scheduler.metrics().requests_finished.values()) == len(served)
    assert scheduler.metrics().tokens_generated == sum(generated.values())
    unread = scheduler.metrics().prompt_tokens - scheduler.metrics().cached_tokens - prefilled
    assert unread == 0 or (unread > 0 and any(client.request.cancelled for client in served))
    assert scheduler.metrics().kept_prompts <= slots
    for client in served:
        usage = client.receiver.usage
        assert usage.completion_tokens == generated[client.request] if usage else client.request.cancelled


def check_answers(backend: ToyBackend, tokenizer: Tokenizer, client: Client) -> None:
    """Checks that each of the request's answers is that of a request of its own, up to where it was cancelled."""
    sampling = client.asked.sampling
    for index, (got, reason) in enumerate(zip(client.receiver.tokens, client.receiver.reasons, strict=True)):
        alone = tokens_alone(backend, tokenizer, client.asked, index)
        if reason == "cancelled":
            assert client.request.cancelled
            assert got == alone[: len(got)]
        else:
            assert got == alone
            ended = alone[-1] in tokenizer.stop_ids and not sampling.ignore_eos
            assert reason == ("stop" if ended else "length")
            assert client.receiver.texts[index] == tokenizer.decode(got)
            assert not ended or len(got) > sampling.min_tokens


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


def test_the_logits_of_a_prompt_are_made_once(tokenizer: Tokenizer) -> None:
    backend = ToyBackend(tokenizer.image_token_id)
    scheduler = Scheduler(backend, tokenizer, max_queue=20, prefill_chunk=4)
    prompts = [ask(tokenizer.image_token_id, seed, length=3 + 5 * seed, first_token=70 + seed) for seed in range(3)]
    for asked in prompts:
        submit(scheduler, asked)
    run(scheduler)
    assert [kind for kind, _ in backend.calls].count("prefill") == 1 + 2 + 4  # 3, 8 and 13 tokens
    assert backend.prompts_read == len(prompts)


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


# --- several answers -------------------------------------------------------------------------------------------------

SAMPLED = {"temperature": 1.0, "seed": 5, "ignore_eos": True}


def test_the_prompt_of_several_answers_is_prefilled_once(tokenizer: Tokenizer) -> None:
    backend = ToyBackend(tokenizer.image_token_id)
    scheduler = Scheduler(backend, tokenizer, 8, prefill_chunk=4)
    asked = ask(tokenizer.image_token_id, 3, images=2, sampling=SamplingParams(6, n=3, **SAMPLED))
    client = submit(scheduler, asked)
    scheduler.step()
    assert scheduler.metrics().free_slots == 0  # the slots of all three answers are kept for them
    run(scheduler)
    prefilled = [size for kind, size in backend.calls if kind == "prefill"]
    assert sum(prefilled) == len(asked.prompt.input_ids)
    assert [call for call in backend.calls if call[0] == "decode"] == [("decode", 3)] * 5
    assert len({tuple(tokens) for tokens in client.receiver.tokens}) == 3
    check_answers(backend, tokenizer, client)


@pytest.mark.parametrize("prompt_seed", range(12))
def test_greedy_answers_to_one_prompt_are_equal(tokenizer: Tokenizer, prompt_seed: int) -> None:
    """Some prompts end with their first token, so no row is copied."""
    backend = ToyBackend(tokenizer.image_token_id)
    scheduler = Scheduler(backend, tokenizer, 8, 256)
    client = submit(scheduler, ask(tokenizer.image_token_id, prompt_seed, sampling=SamplingParams(9, n=3)))
    run(scheduler)
    assert client.receiver.tokens == [tokens_alone(backend, tokenizer, client.asked)] * 3
    assert scheduler.metrics().free_slots == 3


def test_a_request_for_several_answers_waits_for_all_its_slots_and_is_not_overtaken(tokenizer: Tokenizer) -> None:
    backend = ToyBackend(tokenizer.image_token_id, max_slots=3)
    scheduler = Scheduler(backend, tokenizer, max_queue=20, prefill_chunk=256)
    many = [1, 3, 1, 2, 1, 1, 3]
    served = []
    for index, n in enumerate(many):
        sampling = SamplingParams(5 + index, n=n, **SAMPLED)
        served.append(
            submit(scheduler, ask(tokenizer.image_token_id, index, sampling=sampling, first_token=100 + index))
        )
    scheduler.step()
    assert (scheduler.metrics().active, scheduler.metrics().free_slots) == (1, 2)
    scheduler.step()
    assert backend.admitted == [100]  # the second needs three slots, and the third has to wait for it
    run(scheduler)
    assert backend.admitted == list(range(100, 107))
    for client in served:
        check_answers(backend, tokenizer, client)


def test_more_answers_than_slots_are_refused_at_once(tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(ToyBackend(tokenizer.image_token_id, max_slots=3), tokenizer, 8, 256)
    with pytest.raises(ParameterError, match=r"n = 4 is not allowed; it is an integer from 1 to 3, the slots"):
        submit(scheduler, ask(tokenizer.image_token_id, 0, sampling=SamplingParams(n=4)))
    assert scheduler.is_empty


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_cancelling_ends_all_answers(tokenizer: Tokenizer, steps: int) -> None:
    scheduler = Scheduler(ToyBackend(tokenizer.image_token_id), tokenizer, 8, prefill_chunk=6)  # two chunks
    client = submit(scheduler, ask(tokenizer.image_token_id, 0, sampling=SamplingParams(40, n=3, **SAMPLED)))
    for _ in range(steps):
        scheduler.step()
    client.request.cancel()
    scheduler.step()
    assert client.receiver.reasons == ["cancelled"] * 3
    assert [len(tokens) for tokens in client.receiver.tokens] == [max(0, steps - 1) + (steps > 1)] * 3
    assert (client.receiver.usage is None) == (steps == 0)
    assert scheduler.is_empty
    assert scheduler.metrics().free_slots == 3
    assert scheduler.metrics().requests_finished["cancelled"] == 1


def test_an_error_in_one_answer_ends_all_of_the_request_and_no_other(tokenizer: Tokenizer) -> None:
    backend = ToyBackend(tokenizer.image_token_id)
    scheduler = Scheduler(backend, tokenizer, 8, 256)
    sound = submit(scheduler, ask(tokenizer.image_token_id, 0, sampling=SamplingParams(15, ignore_eos=True)))
    sampling = SamplingParams(15, n=2, **SAMPLED)
    poisoned = submit(scheduler, ask(tokenizer.image_token_id, 1, sampling=sampling, first_token=POISON))
    run(scheduler)
    assert isinstance(poisoned.receiver.error, EngineError)
    assert poisoned.receiver.reasons == [None, None]
    assert sound.receiver.token_ids == tokens_alone(backend, tokenizer, sound.asked)
    assert scheduler.metrics().requests_finished == {"stop": 0, "length": 1, "cancelled": 0, "error": 1}
    assert scheduler.metrics().free_slots == 3


@pytest.mark.parametrize("raises_at", [1, 2, 5, 9])
def test_a_callback_that_raises_ends_all_answers(tokenizer: Tokenizer, raises_at: int) -> None:
    """At the first token, while all answers run, and at the end of one of them."""
    scheduler = Scheduler(ToyBackend(tokenizer.image_token_id), tokenizer, 8, 256)
    seen, errors = [], []

    def on_delta(delta: object) -> None:
        seen.append(delta)
        if len(seen) == raises_at:
            raise ValueError("a bug of the caller")

    asked = ask(tokenizer.image_token_id, 2, sampling=SamplingParams(5, n=2, **SAMPLED))
    request = Request(asked.sampling, on_delta, errors.append)
    asked.provide(request)
    scheduler.enqueue(request)
    run(scheduler)
    assert [str(error) for error in errors] == ["a bug of the caller"]
    assert len(seen) == raises_at
    assert scheduler.metrics().free_slots == 3


def test_answers_end_alone_and_the_last_reports_the_usage(tokenizer: Tokenizer) -> None:
    """Ends of text come at random, so the answers end at different steps and their slots are free for others."""
    backend = ToyBackend(tokenizer.image_token_id)
    scheduler = Scheduler(backend, tokenizer, 8, 256)
    client = submit(
        scheduler, ask(tokenizer.image_token_id, 4, sampling=SamplingParams(40, n=3, temperature=3, seed=1))
    )
    free = set()
    while scheduler.has_work:
        scheduler.step()
        free.add(scheduler.metrics().free_slots)
    lengths = [len(tokens) for tokens in client.receiver.tokens]
    assert len(set(lengths)) > 1
    assert len(free) > 2
    assert client.receiver.usage is not None
    assert client.receiver.usage.completion_tokens == sum(lengths)
    check_answers(backend, tokenizer, client)


def test_a_request_that_ended_leaves_memory_at_once(tokenizer: Tokenizer) -> None:
    """Its images may be large, and on a device. Python's search for cycles would find it some time."""
    scheduler = Scheduler(ToyBackend(tokenizer.image_token_id), tokenizer, 8, 256)
    asked = ask(tokenizer.image_token_id, 1, images=1, sampling=SamplingParams(4, n=2, **SAMPLED))
    request = asked.request(Receiver(2))
    ended = weakref.ref(request)
    scheduler.enqueue(request)
    gc.disable()
    try:
        run(scheduler)
        del request
        assert ended() is None
    finally:
        gc.enable()


# --- biases ----------------------------------------------------------------------------------------------------------


def test_unknown_ids_of_logit_bias_are_refused(tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(ToyBackend(tokenizer.image_token_id), tokenizer, 8, 256)
    vocab_size = CONFIG.llm.vocab_size
    asked = ask(tokenizer.image_token_id, 0, sampling=SamplingParams(logit_bias={vocab_size: 1, 3: 1, 10**9: 0}))
    with pytest.raises(ParameterError, match=rf"logit_bias names the token id {vocab_size}, which is unknown"):
        submit(scheduler, asked)


def test_biases_that_leave_no_token_are_refused(tokenizer: Tokenizer) -> None:
    everything = dict.fromkeys(range(CONFIG.llm.vocab_size), -100)
    placeholder, (stop, *_) = tokenizer.image_token_id, tokenizer.stop_ids

    def run_with(bias: dict[int, int], **others: object) -> Client:
        scheduler = Scheduler(ToyBackend(placeholder), tokenizer, 8, 256)
        client = submit(scheduler, ask(placeholder, 0, sampling=SamplingParams(3, logit_bias=bias, **others)))
        run(scheduler)
        return client

    def all_but(token_id: int) -> dict[int, int]:
        return {other: bias for other, bias in everything.items() if other != token_id}

    for refused in (everything, all_but(placeholder)):  # no bias allows a placeholder
        with pytest.raises(ParameterError, match="bans every token"):
            run_with(refused)
    with pytest.raises(ParameterError, match="bans every token"):
        run_with(all_but(stop), min_tokens=1)
    assert run_with(all_but(stop)).receiver.token_ids == [stop]
    assert run_with(all_but(stop), min_tokens=1, ignore_eos=True).receiver.token_ids == [stop] * 3
    assert run_with(all_but(70)).receiver.token_ids == [70] * 3
    assert placeholder not in run_with({placeholder: 100}).receiver.token_ids
