"""Tests drafts: that they leave answers as they are, what is drafted, and how little wrong drafts cost."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from step_requests import StepRequest, decode
from toy_backend import Receiver, ToyBackend, ask, byte_tokenizer, tokens_alone

from nvlm_trt.api import Answer, ChatRequest, Message, SamplingParams, merge_answers
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.builders.graphs.self_attention import GroupQueryAttention
from nvlm_trt.engine import Engine
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.drafting import Drafter
from nvlm_trt.runtime.pipeline import Pipeline
from nvlm_trt.runtime.scheduler import Scheduler

Directory = Callable[[str], Path]
CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
RECEIPT = (Path(__file__).parents[2] / "docs" / "images" / "receipt.png").read_bytes()
NAMES = [f"nvlm-{letter}-tiny" for letter in "dxh"]
NEVER = 999


# --- what is drafted -------------------------------------------------------------------------------------------------


def test_what_came_after_the_same_three_tokens_last_is_drafted() -> None:
    drafter = Drafter([1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 8, 9, 10, 11], most=3, never=NEVER)
    assert drafter.draft(3) == []
    for token_id in (1, 2, 3):
        drafter.add(token_id)
    assert drafter.draft(3) == [8, 9, 10]
    assert drafter.draft(1) == [8]


def test_the_longest_repetition_counts() -> None:
    drafter = Drafter([1, 2, 3, 4, 5, 6, 7, 9, 9, 9, 3, 4, 5, 8, 8, 0, 1, 2], most=3, never=NEVER)
    for token_id in (3, 4, 5):
        drafter.add(token_id)
    assert drafter.draft(2) == [6, 7]  # after 1, 2, 3, 4, 5, and not after the last 3, 4, 5


def test_a_repetition_is_drafted_on_beyond_its_end() -> None:
    drafter = Drafter([5, 1, 2, 3, 1, 2, 3], most=8, never=NEVER)
    drafter.learn(4, 4)
    assert drafter.draft(8) == [1, 2, 3, 1, 2, 3, 1, 2]


def test_an_image_placeholder_is_never_drafted() -> None:
    drafter = Drafter([1, 2, 3, 4, NEVER, NEVER, 1, 2, 3], most=8, never=NEVER)
    assert drafter.draft(8) == [4]


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 9), st.integers(1, 9))
def test_a_draft_is_what_followed(tokens: list[int], most: int, wanted: int) -> None:
    """Compares the drafter with a search from the end."""
    half = len(tokens) // 2
    drafter = Drafter(tokens[:half], most, never=NEVER)
    for token_id in tokens[half:]:
        drafter.add(token_id)
    found = ([i for i in range(n, len(tokens)) if tokens[i - n : i] == tokens[-n:]] for n in (8, 5, 3))
    places = next(filter(None, found), [])
    drafted = drafter.draft(wanted)
    if not places:
        assert drafted == []
        return
    assert 1 <= len(drafted) <= min(most, wanted)
    follows = list(tokens)
    for token_id in drafted:
        follows.append(follows[places[-1] + len(follows) - len(tokens)])
        assert token_id == follows[-1]


def test_drafts_that_are_always_wrong_cost_less_than_two_steps_and_two_percent() -> None:
    """In steps of decoding one answer, as docs/architecture.md says; every word repeats, and no draft is right."""
    drafter, lost = Drafter([1, 1, 1, 1], most=32, never=NEVER), 0.0
    for generated in range(1, 2000):
        drafter.add(1)
        drafted = drafter.draft(32)
        if drafted:
            drafter.learn(len(drafted), 0)
            lost += (len(drafted) + 1) / 6  # the check itself has given a token, as a step
        assert lost <= 2 + 0.02 * generated
    assert lost > 1


def test_drafts_that_are_right_become_longer() -> None:
    drafter = Drafter([1] * 10, most=32, never=NEVER)
    lengths = []
    for _ in range(6):
        lengths.append(len(drafter.draft(32)))
        drafter.learn(lengths[-1], lengths[-1])
    assert lengths == [4, 8, 16, 32, 32, 32]


# --- answers, of a toy whose logits depend on every token ------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return byte_tokenizer(directory)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_leave_every_drawn_token_as_it_is(tokenizer: Tokenizer, temperature: float) -> None:
    """A sampled answer has the same tokens with the same seed, hence the same distribution. Two letters make drafts
    that are right by chance. Neighbours draft too."""
    backend = ToyBackend(tokenizer.image_token_id, max_slots=4, max_seq_len=256)
    scheduler = Scheduler(backend, tokenizer, 200, 8)
    asked, receivers = [], []
    for seed in range(40):
        sampling = SamplingParams(
            90, temperature=temperature, seed=seed, logit_bias={65: 100, 66: 100}, draft_tokens=seed % 9, n=1 + seed % 2
        )
        asked.append(ask(tokenizer.image_token_id, seed, images=seed % 3, sampling=sampling))
        receivers.append(Receiver(sampling.n))
        scheduler.enqueue(asked[-1].request(receivers[-1]))
    while scheduler.has_work:
        scheduler.step()
    for one, receiver in zip(asked, receivers, strict=True):
        for index, tokens in enumerate(receiver.tokens):
            assert tokens == tokens_alone(backend, tokenizer, one, index)
    metrics = scheduler.metrics()
    assert metrics.draft_tokens > metrics.accepted_draft_tokens + 50 > 100
    assert sum(len(tokens) for receiver in receivers for tokens in receiver.tokens) == metrics.tokens_generated


def test_a_draft_ends_with_the_answer(tokenizer: Tokenizer) -> None:
    """At max_tokens, at the end of the sequence, and at a stop string; usage counts what was drawn."""
    backend = ToyBackend(tokenizer.image_token_id, max_seq_len=64)
    for changes in ({}, {"max_tokens": 30}, {"stop": ("AAAAAAAAAAAAAAA",)}):
        sampling = SamplingParams(**{"max_tokens": 100, "logit_bias": {65: 100}, "draft_tokens": 32, **changes})
        scheduler = Scheduler(backend, tokenizer, 9, 8)
        asked, receiver = ask(tokenizer.image_token_id, 0, sampling=sampling), Receiver()
        scheduler.enqueue(asked.request(receiver))
        while scheduler.has_work:
            scheduler.step()
        expected = tokens_alone(backend, tokenizer, asked)[: 15 if sampling.stop else None]
        assert receiver.token_ids == expected
        assert receiver.usage is not None
        assert receiver.usage.completion_tokens == len(expected)
        assert scheduler.metrics().accepted_draft_tokens > 5
        assert scheduler.metrics().free_slots == 3


def test_a_request_that_is_dropped_in_the_middle_of_a_draft(tokenizer: Tokenizer) -> None:
    backend = ToyBackend(tokenizer.image_token_id, max_seq_len=256)
    scheduler = Scheduler(backend, tokenizer, 9, 8)
    sampling = SamplingParams(100, logit_bias={65: 100}, draft_tokens=32)
    seen, errors = [], []

    def on_delta(delta: object) -> None:
        seen.append(delta)
        if len(seen) == 17:
            raise ValueError("a bug of the caller")

    request = ask(tokenizer.image_token_id, 0, sampling=sampling).request(Receiver())
    request.on_delta, request.on_error = on_delta, errors.append
    neighbour, receiver = ask(tokenizer.image_token_id, 1, sampling=sampling), Receiver()
    scheduler.enqueue(request)
    scheduler.enqueue(neighbour.request(receiver))
    while scheduler.has_work:
        scheduler.step()
    assert len(seen) == 17
    assert len(errors) == 1
    assert receiver.token_ids == tokens_alone(backend, tokenizer, neighbour)


# --- answers, of real engines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["fp32", "int8-weight-only"])
def test_tokens_have_the_same_bits_however_many_are_scored_together(
    checkpoint: Directory, engine: Directory, tmp_path: Path, name: str, precision: str
) -> None:
    """Two tokens or more. A single token has a kernel of its own in ONNX Runtime's attention: its logits are close."""
    fp32 = precision == "fp32"
    path = engine(name) if fp32 else build_engine(checkpoint(name), tmp_path / "engine", precision=precision).path
    with open_backend(Engine.open(path), threads=2) as backend:
        request = StepRequest(backend, path, "What is <image>?", [3], seed=0)
        tokens = np.random.default_rng(0).integers(0, 256, 24)
        ranges = np.tile(np.array(request.decode_range, np.int32), (len(tokens), 1))

        def scored(sizes: Sequence[int]) -> np.ndarray:
            request.prefill(1)
            rows, start = [], 0
            for size in sizes:
                part = slice(start, start + size)
                rows.append(backend.score_tokens(1, request.length + start, tokens[part], ranges[part]))
                start += size
            return np.concatenate([row for row in rows if row is not None])

        whole = scored([24])
        assert whole.shape == (24, backend.config.llm.vocab_size)
        assert np.isfinite(whole).all()
        for sizes in ([2] * 12, [3] * 8, [5, 7, 12], [16, 8]):
            assert np.array_equal(scored(sizes), whole)
        request.prefill(0)
        single = np.array([decode(backend, [request], tokens[i : i + 1], i)[0].copy() for i in range(24)])
        np.testing.assert_allclose(whole, single, rtol=0, atol=2e-5 if fp32 else 0.5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Directory:
    root = tmp_path_factory.mktemp("trained")

    def make(name: str) -> Path:
        if not (root / name).exists():
            build_engine(CHECKPOINTS / name, root / name)
        return root / name

    return make


def ask_engine(pipeline: Pipeline, question: str, **sampling: Any) -> Answer:
    chat = ChatRequest([Message("user", question)], (RECEIPT,), SamplingParams(**{"max_tokens": 60, **sampling}))
    return merge_answers(list(pipeline.generate(chat)))[0]


QUESTIONS = ["What is the total?", "Read the text.", "List the items, list the items, list the items."]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_answers_have_the_same_tokens_in_fp32(trained: Directory, name: str) -> None:
    """Of trained models, whose answers go on beyond their end and repeat themselves there."""
    with Pipeline.open(trained(name), threads=1) as pipeline:
        for question in QUESTIONS:
            plain = ask_engine(pipeline, question, ignore_eos=True)
            drafted = ask_engine(pipeline, question, ignore_eos=True, draft_tokens=8)
            assert drafted.token_ids == plain.token_ids
            assert drafted.text == plain.text
        assert pipeline.metrics().generator.accepted_draft_tokens > 3


@pytest.mark.parametrize("name", NAMES)
def test_neighbours_change_no_bit_of_an_answer_with_drafts(trained: Directory, name: str) -> None:
    sampling: dict[str, Any] = {"draft_tokens": 8, "logprobs": 3, "ignore_eos": True}
    drawn = {**sampling, "temperature": 0.4, "seed": 3}
    with Pipeline.open(trained(name), threads=1) as pipeline:
        asked = [(question, kind) for question in QUESTIONS for kind in (sampling, drawn)]
        alone = [ask_engine(pipeline, question, **kind) for question, kind in asked]
        with ThreadPoolExecutor(len(asked)) as pool:
            together = list(pool.map(lambda both: ask_engine(pipeline, both[0], **both[1]), asked))
    assert [answer.logprobs for answer in together] == [answer.logprobs for answer in alone]


def test_engines_of_an_earlier_version_answer_without_drafts(
    checkpoint: Directory, engine: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(GroupQueryAttention, "several_logits", False)
        old = build_engine(checkpoint("nvlm-d-tiny"), tmp_path / "old").path
    answers = []
    for path in (old, engine("nvlm-d-tiny")):
        with Pipeline.open(path, threads=1) as pipeline:
            answers.append(ask_engine(pipeline, "aaaaaaaaaa", logit_bias={97: 100}, draft_tokens=8))
            checked = pipeline.metrics().generator.draft_tokens
            assert (checked == 0) == (path == old)
    assert answers[0].token_ids == answers[1].token_ids
    shutil.rmtree(old)
