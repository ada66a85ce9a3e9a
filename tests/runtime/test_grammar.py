"""Answers that are made of random logits fit what they are bound to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from random_schemas import Schema, schemas
from toy_backend import CONFIG, byte_tokenizer
from trained_tokenizers import train_qwen2_like, train_yi_like

from nvlm_trt.api import Constraint, SamplingParams
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.grammar import Grammars
from nvlm_trt.runtime.sampling import Sampler

NOTHING = np.empty(0, np.int64)
VOCAB = CONFIG.llm.vocab_size
LONG = 150  # tokens, after which an answer prefers to end
CLOSING = {256: 50, 258: 50, ord('"'): 40, ord("}"): 30, ord("]"): 30}  # 256 and 258: the byte tokenizer's ends of text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return byte_tokenizer(directory)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    grammars = Grammars(tokenizer, VOCAB)
    yield grammars
    grammars.close()


def answer(
    grammars: Grammars,
    tokenizer: Tokenizer,
    constraint: Constraint,
    seed: int,
    params: SamplingParams | None = None,
    most: int = 3000,
) -> tuple[list[int], str]:
    """Draws an answer from random logits. Returns its tokens and its text; an answer that does not end is an error."""
    state = grammars.compile(constraint).start()
    random = np.random.default_rng(seed)
    params = params or SamplingParams(temperature=1.0, seed=seed)
    sampler = Sampler(params, NOTHING, {tokenizer.image_token_id}, tokenizer.stop_ids, 0, state)
    tokens: list[int] = []
    while not state.is_complete:
        logits = random.normal(0, 3, VOCAB).astype(np.float32)
        if len(tokens) > LONG:
            logits[list(CLOSING)] += list(CLOSING.values())
        tokens.append(sampler.sample(logits)[0])
        if tokens[-1] in tokenizer.stop_ids:
            break
        assert len(tokens) < most, tokenizer.decode(tokens)
    return tokens, tokenizer.decode(tokens)


@settings(max_examples=1000)
@given(schema=schemas(), seed=st.integers(0, 999))
def test_a_thousand_random_schemas(grammars: Grammars, tokenizer: Tokenizer, schema: Schema, seed: int) -> None:
    _, text = answer(grammars, tokenizer, Constraint(json_schema=schema), seed)
    Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(json.loads(text))


@pytest.mark.parametrize("seed", range(20))
def test_any_json_object(grammars: Grammars, tokenizer: Tokenizer, seed: int) -> None:
    _, text = answer(grammars, tokenizer, Constraint(json_object=True), seed)
    assert isinstance(json.loads(text), dict)


PATTERNS = [
    "[a-f]{2,4}(-[0-9]+)?",
    "(yes|no)( please)?",
    "a*b+c?",
    r"\d\d:\d\d",
    r"[^x\n]{0,3}x",
    "(?:0|[1-9][0-9]{0,2})(?:\\.(?:0|[1-9][0-9]{0,2})){3}",
    "^anchored$",
    "é{1,2}|日本",
    "a/b\\\\c",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_a_regular_expression_allows(grammars: Grammars, tokenizer: Tokenizer, pattern: str) -> None:
    """`regex`, which can match the beginning of a text, says for each next byte whether the text may go on so."""
    ascii_only = regex.compile(pattern, regex.ASCII)
    for seed in range(5):
        state = grammars.compile(Constraint(regex=pattern)).start()
        random, text = np.random.default_rng(seed), ""
        while not state.is_complete and len(text) < 12:
            allowed = state.allowed()
            expected = [bool(ascii_only.fullmatch(text + chr(byte), partial=True)) for byte in range(128)]
            if pattern.isascii():
                assert allowed[:128].tolist() == expected, (pattern, text)
            assert allowed[256] == allowed[258] == bool(ascii_only.fullmatch(text)), (pattern, text)
            choices = np.flatnonzero(allowed[:128]) if pattern.isascii() else np.flatnonzero(allowed[:256])
            if not len(choices):
                break
            token = int(random.choice(choices))
            state.accept(token)
            text += chr(token) if pattern.isascii() else ""
            if not pattern.isascii():
                break


@given(choices=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=6, unique=True), seed=st.integers(0, 999))
@settings(max_examples=100)
def test_an_answer_is_one_of_the_choices(
    grammars: Grammars, tokenizer: Tokenizer, choices: list[str], seed: int
) -> None:
    _, text = answer(grammars, tokenizer, Constraint(choice=choices), seed)
    assert text in choices


def test_each_choice_can_be_drawn(grammars: Grammars, tokenizer: Tokenizer) -> None:
    choices = ["no", "no, never", "yes", "(a|b)*", "a\nb", " "]
    drawn = {answer(grammars, tokenizer, Constraint(choice=choices), seed)[1] for seed in range(100)}
    assert drawn == set(choices)


# --- with the other parameters ---------------------------------------------------------------------------------------


def test_greedy_takes_the_most_probable_of_the_allowed(grammars: Grammars, tokenizer: Tokenizer) -> None:
    state = grammars.compile(Constraint(regex="[b-d]x")).start()
    logits = np.zeros(VOCAB, np.float32)
    logits[[ord("a"), ord("c"), ord("d")]] = [9, 5, 7]
    sampler = Sampler(SamplingParams(logprobs=1), NOTHING, grammar=state)
    token, logprobs = sampler.sample(logits)
    assert token == ord("d")
    assert logprobs is not None
    assert logprobs.top[0][0] == ord("a"), "log-probabilities are the model's own"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_parameters_change_what_is_drawn_within_the_constraint(
    grammars: Grammars, tokenizer: Tokenizer, temperature: float
) -> None:
    constraint = Constraint(regex="[ab]{12}")
    biased = SamplingParams(temperature=temperature, seed=1, logit_bias={ord("a"): -100, ord("z"): 100})
    assert answer(grammars, tokenizer, constraint, 0, biased)[1] == "b" * 12
    penalised = SamplingParams(temperature=temperature, seed=1, presence_penalty=2, frequency_penalty=2)
    assert re.fullmatch("[ab]{12}", answer(grammars, tokenizer, constraint, 0, penalised)[1])
    narrow = SamplingParams(temperature=1, seed=1, top_k=1, top_p=0.5, min_p=0.9, repetition_penalty=2)
    assert re.fullmatch("[ab]{12}", answer(grammars, tokenizer, constraint, 0, narrow)[1])


def test_min_tokens_hold_the_end_back_where_more_may_follow(grammars: Grammars, tokenizer: Tokenizer) -> None:
    for seed in range(10):
        params = SamplingParams(temperature=1.0, seed=seed, min_tokens=9)
        tokens, text = answer(grammars, tokenizer, Constraint(regex="a*"), seed, params)
        assert len(text) >= 9
        assert len(tokens) > 9
        _, text = answer(grammars, tokenizer, Constraint(choice=["no", "no way"]), seed, params)
        assert text == "no way"


def test_the_image_placeholder_is_never_drawn(grammars: Grammars, tokenizer: Tokenizer) -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[[tokenizer.image_token_id, *range(259, VOCAB)]] = 50
    state = grammars.compile(Constraint(regex="(?s:.*)")).start()
    sampler = Sampler(SamplingParams(), NOTHING, {tokenizer.image_token_id}, tokenizer.stop_ids, 0, state)
    for _ in range(20):
        assert sampler.sample(logits)[0] < 256


def test_what_other_answers_take_changes_nothing(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """A compiled constraint is kept, and every answer starts from its beginning."""
    constraint = Constraint(json_object=True)
    first = answer(grammars, tokenizer, constraint, 3)
    answer(grammars, tokenizer, constraint, 4)
    assert answer(grammars, tokenizer, constraint, 3) == first
    assert grammars.compile(constraint) is grammars.compile(Constraint(json_object=True))


# --- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [train_qwen2_like, train_yi_like])
def test_tokens_mean_the_bytes_that_they_are_decoded_to(train: Any) -> None:
    tokenizer = Tokenizer(train())
    grammars = Grammars(tokenizer, tokenizer.vocab_size + 7)
    tokens = grammars._prepared()
    for token_id in range(tokenizer.vocab_size):
        expected = tokenizer.token_bytes[token_id]
        if expected and expected != b"\xff":  # which is no part of UTF-8, and marks special tokens in llguidance
            assert tokens.decode_bytes([token_id]) == expected
    random = np.random.default_rng(0)
    for constraint, matches in (
        (Constraint(regex="[a-z ]{5,9}"), lambda text: re.fullmatch("[a-z ]{5,9}", text)),
        (Constraint(json_schema={"type": "string", "maxLength": 5}), lambda text: isinstance(json.loads(text), str)),
    ):
        state = grammars.compile(constraint).start()
        drawn: list[int] = []
        while not state.is_complete:
            allowed = np.flatnonzero(state.allowed())
            assert allowed[-1] < tokenizer.vocab_size
            drawn.append(int(random.choice(allowed)))
            if drawn[-1] in tokenizer.stop_ids:
                break
            state.accept(drawn[-1])
        data = b"".join(tokenizer.token_bytes[token_id] for token_id in drawn)
        assert matches(data.decode()), data
    grammars.close()
