"""Constraints of requests: from submission to the last delta, beside other requests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gateway_calls import png
from toy_backend import Receiver, ToyBackend, ask, byte_tokenizer, tokens_alone

from nvlm_trt.api import ChatRequest, Constraint, Delta, Message, SamplingParams, merge_answers
from nvlm_trt.errors import ParameterError
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.grammar import Grammars
from nvlm_trt.runtime.pipeline import Pipeline
from nvlm_trt.runtime.scheduler import Scheduler

SCHEMA = {
    "type": "object",
    "properties": {
        "total": {"type": "integer", "minimum": 0, "maximum": 9999},
        "items": {"type": "array", "items": {"enum": ["tea", "rice"]}, "maxItems": 3},
    },
    "required": ["total", "items"],
    "additionalProperties": False,
}
BOUND = Constraint(json_schema=SCHEMA)


@pytest.fixture(scope="module")
def pipeline(engine: Callable[[str], Path]) -> Iterator[Pipeline]:
    with Pipeline.open(engine("nvlm-x-tiny"), threads=1) as pipeline:
        yield pipeline


def chat(text: str = "What is it?", *images: bytes, **sampling: Any) -> ChatRequest:
    return ChatRequest([Message("user", text)], images, SamplingParams(**{"max_tokens": 300, **sampling}))


def check(text: str) -> None:
    value = json.loads(text)
    assert value.keys() == {"total", "items"}
    assert 0 <= value["total"] <= 9999
    assert set(value["items"]) <= {"tea", "rice"}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_fit_and_end_by_themselves(pipeline: Pipeline, temperature: float) -> None:
    sampling = {"constraint": BOUND, "temperature": temperature, "seed": 1, "n": 3, "logprobs": 2}
    deltas = list(pipeline.generate(chat("What is it?", png(), **sampling)))
    answers = merge_answers(deltas)
    assert len(answers) == 3
    assert len({answer.text for answer in answers}) == (3 if temperature else 1)
    for answer in answers:
        check(answer.text)
        assert answer.finish_reason == "stop"
        assert len(answer.logprobs) == len(answer.token_ids)
        # the closing bracket ends it, not a token behind that
        assert b"".join(token.utf8 for token in answer.logprobs).decode() == answer.text
        assert answer.logprobs[-1].utf8.endswith(b"}")
    again = merge_answers(list(pipeline.generate(chat("What is it?", png(), **sampling))))
    assert [answer.text for answer in again] == [answer.text for answer in answers]


def test_stop_strings_and_max_tokens_cut_an_answer(pipeline: Pipeline) -> None:
    (whole,) = merge_answers(list(pipeline.generate(chat(constraint=BOUND))))
    (stopped,) = merge_answers(list(pipeline.generate(chat(constraint=BOUND, stop='"items'))))
    assert stopped.text == whole.text[: whole.text.index('"items')]
    assert stopped.finish_reason == "stop"
    (cut,) = merge_answers(list(pipeline.generate(chat(constraint=BOUND, max_tokens=5))))
    assert whole.text.startswith(cut.text)
    assert cut.finish_reason == "length"


def test_an_answer_ends_without_a_token_more(pipeline: Pipeline) -> None:
    (answer,) = merge_answers(list(pipeline.generate(chat(constraint=Constraint(choice=["a"])))))
    assert (answer.text, len(answer.token_ids), answer.finish_reason) == ("a", 1, "stop")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 1


def test_a_refused_constraint_frees_its_place(pipeline: Pipeline) -> None:
    for constraint in (Constraint(regex="("), Constraint(json_schema={"$ref": "#"}), Constraint(regex="a{99999}")):
        with pytest.raises(ParameterError, match="cannot be followed"):
            list(pipeline.generate(chat("What is it?", png(), constraint=constraint)))
    bans = dict.fromkeys(range(256), -100)
    with pytest.raises(ParameterError, match="logit_bias bans every token that constraint allows"):
        list(pipeline.generate(chat(constraint=BOUND, logit_bias=bans)))
    metrics = pipeline.metrics().generator
    assert (metrics.queued, metrics.active) == (0, 0)
    check(merge_answers(list(pipeline.generate(chat(constraint=BOUND))))[0].text)


def test_a_slow_compilation_holds_up_nobody(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The constraint of one request is compiled while another request is answered."""
    grammars: Any = pipeline._generator._grammars  # type: ignore[attr-defined]
    compile_now, may_go_on, begun = grammars.compile, threading.Event(), threading.Event()

    def compile_later(*arguments: Any) -> Any:
        begun.set()
        assert may_go_on.wait(60)
        return compile_now(*arguments)

    monkeypatch.setattr(grammars, "compile", compile_later)
    ended, deltas = threading.Event(), list[Delta]()

    def put(delta: Delta) -> None:
        deltas.append(delta)
        if delta.finish_reason:
            ended.set()

    pipeline.submit(chat(constraint=BOUND), put, lambda error: ended.set())
    assert begun.wait(60)
    (other,) = merge_answers(list(pipeline.generate(chat(max_tokens=5, ignore_eos=True))))
    assert other.finish_reason == "length"
    assert not deltas
    may_go_on.set()
    assert ended.wait(60)
    check("".join(delta.text for delta in deltas))


# --- beside other requests -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_neighbours_keep_their_tokens(tokenizer: Tokenizer) -> None:
    """Requests with and without constraints share every batch, and each of the latter gets the tokens that it gets
    alone."""
    backend = ToyBackend(tokenizer.image_token_id, max_slots=5, max_seq_len=200)
    scheduler = Scheduler(backend, tokenizer, max_queue=16, prefill_chunk=4)
    grammars = Grammars(tokenizer, backend.config.llm.vocab_size)
    asked, receivers = [], []
    for index in range(12):
        constraint = [None, Constraint(regex="[a-z]{20,40}"), BOUND][index % 3]
        sampling = SamplingParams(
            max_tokens=150,
            temperature=float(index % 2),
            seed=index,
            repetition_penalty=1.0 + 0.3 * (index % 4 == 0),
            constraint=constraint,
            n=1 + (index % 5 == 0),
        )
        asked.append(ask(tokenizer.image_token_id, index, images=index % 2, sampling=sampling))
        receivers.append(Receiver(sampling.n))
        request = asked[-1].request(receivers[-1])
        request.grammar = grammars.compile(constraint) if constraint else None
        scheduler.enqueue(request)
    while scheduler.has_work:
        scheduler.step()
    for one, receiver in zip(asked, receivers, strict=True):
        assert receiver.error is None
        for index, text in enumerate(receiver.texts):
            if one.sampling.constraint is None:
                assert receiver.tokens[index] == tokens_alone(backend, tokenizer, one, index)
            elif one.sampling.constraint.regex:
                assert text.isalpha()
                assert 20 <= len(text) <= 40
            else:
                check(text)
    grammars.close()


def test_no_constraint_is_forgotten(tokenizer: Tokenizer) -> None:
    """A request whose constraint nobody compiled is an error, not an answer of any text."""
    scheduler = Scheduler(ToyBackend(tokenizer.image_token_id), tokenizer, max_queue=4, prefill_chunk=4)
    receiver = Receiver()
    scheduler.enqueue(ask(tokenizer.image_token_id, 0, sampling=SamplingParams(constraint=BOUND)).request(receiver))
    while scheduler.has_work:
        scheduler.step()
    assert isinstance(receiver.error, AssertionError)
    assert np.sum([len(tokens) for tokens in receiver.tokens]) == 0
