from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nvlm_trt.api import SamplingParams
from nvlm_trt.errors import EngineError, RequestError
from nvlm_trt.runtime.sampling import Sampler, answer_seed, candidates, draw

NOTHING = np.empty(0, dtype=np.int64)

# Steps of 1/64 keep distinct logits distinct, so that no tie hides in a rounding.
logit_vectors = st.lists(st.integers(-640, 640), min_size=2, max_size=40).map(
    lambda steps: np.array(steps, dtype=np.float32) / 64
)


def huggingface_scores(logits: np.ndarray, params: SamplingParams, seen: list[int]) -> np.ndarray:
    """Process logits [vocab] as transformers' generate does before it draws; excluded tokens are -inf."""
    steps: list[Any] = [RepetitionPenaltyLogitsProcessor(params.repetition_penalty)] if seen else []
    steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    ids = torch.tensor([seen], dtype=torch.int64)
    return LogitsProcessorList(steps)(ids, torch.from_numpy(logits)[None].clone())[0].numpy()


@given(
    logits=logit_vectors,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_candidates_are_those_of_transformers(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    # transformers breaks ties at the end of top-k and top-p by the order of its sort; we keep all of them
    assume(len(set(logits.tolist())) == len(logits))
    probabilities = np.sort(np.exp((logits - logits.max()).astype(np.float64) / temperature))[::-1]
    if top_k:
        probabilities = probabilities[:top_k]
    # tokens closer to a limit than float32's rounding may be kept or not
    assume(np.abs(probabilities.cumsum() / probabilities.sum() - top_p).min() > 1e-5 or top_p == 1)
    assume(np.abs(probabilities - min_p).min() > 1e-5)

    expected = huggingface_scores(logits, params, seen=[])
    token_ids, weights = candidates(logits, params)
    assert np.isfinite(weights).all()
    assert token_ids.tolist() == np.flatnonzero(expected > -np.inf).tolist()
    theirs = torch.softmax(torch.from_numpy(expected), dim=-1).numpy()[token_ids]
    np.testing.assert_allclose(weights / weights.sum(), theirs, atol=1e-5)


@given(logits=logit_vectors, penalty=st.floats(0.1, 10), data=st.data())
def test_repetition_penalty_is_that_of_transformers(logits: np.ndarray, penalty: float, data: st.DataObject) -> None:
    prompt = data.draw(st.lists(st.integers(0, len(logits) - 1), min_size=1, max_size=10))
    params = SamplingParams(temperature=0, repetition_penalty=penalty)
    sampler = Sampler(params, np.array(prompt))
    seen = list(prompt)
    for _ in range(5):  # the answer's own tokens count as well
        scores = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), torch.from_numpy(logits)[None].clone())
        token_id, _ = sampler.sample(logits)
        assert scores[0, token_id] == scores[0].max()
        seen.append(token_id)


def expected_scores(
    logits: np.ndarray, params: SamplingParams, prompt: list[int], drawn: list[int], banned: int, stop_id: int
) -> np.ndarray:
    """Process logits [vocab] with transformers' processors, in the order of its generate; the two penalties that it
    lacks by the formula of OpenAI's reference, mu[j] - c[j] * frequency - (c[j] > 0) * presence."""
    ids, scores = torch.tensor([prompt + drawn], dtype=torch.int64), torch.from_numpy(logits)[None].clone()
    if params.logit_bias:
        biases = {(i,): -math.inf if bias == -100 else float(bias) for i, bias in params.logit_bias.items()}
        scores = SequenceBiasLogitsProcessor(biases)(ids, scores)
    if prompt + drawn:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    counts = torch.bincount(torch.tensor(drawn, dtype=torch.int64), minlength=len(logits))
    scores = scores - counts * params.frequency_penalty - (counts > 0) * params.presence_penalty
    scores = MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, stop_id)(ids, scores)
    scores[0, banned] = -math.inf
    return scores[0].numpy()


@given(
    logits=st.lists(logit_vectors, min_size=1, max_size=8),
    temperature=st.sampled_from([0.0, 1.0]),
    repetition=st.sampled_from([1.0, 0.7, 1.3]),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    min_tokens=st.integers(0, 6),
    data=st.data(),
)
def test_scores_are_those_of_transformers_and_openai(
    logits: list[np.ndarray],
    temperature: float,
    repetition: float,
    presence: float,
    frequency: float,
    min_tokens: int,
    data: st.DataObject,
) -> None:
    size = 12
    steps = [np.resize(row, size) for row in logits]
    ids = st.integers(0, size - 1)
    banned, stop_id, allowed = data.draw(st.lists(ids, min_size=3, max_size=3, unique=True))
    bias = data.draw(st.dictionaries(ids, st.sampled_from([-100.0, 100.0, -3.5, 0.25]), max_size=size))
    bias.pop(allowed, None)  # one token is possible
    prompt = data.draw(st.lists(ids, max_size=6))
    params = SamplingParams(
        temperature=temperature,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
        min_tokens=min_tokens,
        seed=1,
    )
    sampler = Sampler(params, np.array(prompt, np.int64), {banned}, {stop_id})
    drawn: list[int] = []
    for row in steps:
        expected = expected_scores(row, params, prompt, drawn, banned, stop_id)
        np.testing.assert_allclose(sampler._scores(row), expected, rtol=1e-5, atol=1e-4)
        token_id, _ = sampler.sample(row)
        assert np.isfinite(expected[token_id])
        assert temperature or expected[token_id] >= expected.max() - 1e-4
        drawn.append(token_id)


def test_the_penalties_of_openai_do_not_count_the_prompt() -> None:
    """The repetition penalty does, as in transformers."""
    logits = np.array([1.0, 0.9], dtype=np.float32)
    prompt = np.zeros(5, np.int64)
    for params in (SamplingParams(presence_penalty=2), SamplingParams(frequency_penalty=2)):
        sampler = Sampler(params, prompt)
        assert [sampler.sample(logits)[0] for _ in range(3)] == [0, 1, 0]
    assert Sampler(SamplingParams(repetition_penalty=2), prompt).sample(logits)[0] == 1


def test_the_frequency_penalty_grows_and_the_presence_penalty_does_not() -> None:
    logits = np.array([3.5, 0.0, 2.0], dtype=np.float32)
    frequency = Sampler(SamplingParams(frequency_penalty=1), NOTHING)
    assert [frequency.sample(logits)[0] for _ in range(6)] == [0, 0, 2, 0, 2, 0]
    presence = Sampler(SamplingParams(presence_penalty=1), NOTHING)
    assert [presence.sample(logits)[0] for _ in range(6)] == [0] * 6


def test_each_answer_has_the_draws_of_a_request_with_its_seed() -> None:
    seeds = [answer_seed(7, index) for index in range(20)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 20
    assert seeds[1] == 4042502035264064771  # the same on every machine and with every NumPy
    assert answer_seed(None, 3) is None
    for index, seed in enumerate(seeds):
        assert flat_draws(seed=7, index=index) == flat_draws(seed=seed)
    assert len({tuple(flat_draws(seed=seed)) for seed in seeds}) == 20
    assert SamplingParams(seed=answer_seed(2**64 - 1, 65535))  # is a seed


@given(st.lists(st.sampled_from([0.0, 1e-30, 0.25, 1.0]), min_size=1, max_size=1500), st.floats(0, 1, exclude_max=True))
def test_draw_inverts_the_running_sum(weights: list[float], uniform: float) -> None:
    assume(any(weights))
    index = draw(np.array(weights, dtype=np.float32), uniform)
    running = np.cumsum(np.array(weights, dtype=np.float32), dtype=np.float64) / np.sum(weights, dtype=np.float64)
    assert weights[index] > 0
    assert running[index] >= uniform - 1e-9
    assert index == 0 or running[index] - weights[index] / np.sum(weights) <= uniform + 1e-6


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"repetition_penalty": 1.5}])
def test_tokens_are_drawn_as_often_as_their_probability_says(settings: dict[str, float]) -> None:
    logits = np.random.default_rng(1).normal(size=12).astype(np.float32) * 1.5
    params = SamplingParams(temperature=1.3, seed=7, **settings)  # type: ignore[arg-type]
    prompt = [2, 3]
    penalised = prompt if "repetition_penalty" in settings else []
    expected = torch.softmax(torch.from_numpy(huggingface_scores(logits, params, penalised)), -1).double().numpy()
    draws = 20_000
    random = np.random.default_rng(params.seed)
    token_ids, weights = candidates(Sampler(params, np.array(prompt))._scores(logits), params)
    counts = np.bincount([token_ids[draw(weights, random.random())] for _ in range(draws)], minlength=len(logits))
    deviation = np.sqrt(draws * expected * (1 - expected))
    assert (counts[expected == 0] == 0).all()
    assert (np.abs(counts - draws * expected) <= 4.5 * deviation + 1e-9).all()


def flat_draws(seed: int | None, index: int = 0) -> list[int]:
    """Draws 50 tokens from 1000 that are equally probable."""
    sampler = Sampler(SamplingParams(temperature=1, seed=seed), NOTHING, index=index)
    return [sampler.sample(np.zeros(1000, dtype=np.float32))[0] for _ in range(50)]


def test_a_seed_repeats_the_tokens_and_no_seed_does_not() -> None:
    assert flat_draws(seed=3) == flat_draws(seed=3)
    assert flat_draws(seed=3) != flat_draws(seed=4)
    assert flat_draws(seed=None) != flat_draws(seed=None)


@given(logits=logit_vectors, temperature=st.sampled_from([0, 5e-324, 1e-40, 1e-6]))
def test_next_to_no_temperature_is_greedy(logits: np.ndarray, temperature: float) -> None:
    assume(len(set(logits.tolist())) == len(logits))
    sampler = Sampler(SamplingParams(temperature=temperature), NOTHING)
    assert sampler.sample(logits)[0] == int(logits.argmax())


@given(
    logits=logit_vectors,
    temperature=st.sampled_from([0.0, 1.0]),
    penalty=st.sampled_from([0.5, 1.0]),
    top_k=st.integers(0, 3),
)
def test_banned_ids_are_never_drawn(logits: np.ndarray, temperature: float, penalty: float, top_k: int) -> None:
    banned = int(logits.argmax())
    params = SamplingParams(temperature=temperature, repetition_penalty=penalty, top_k=top_k)
    sampler = Sampler(params, np.array([0]), banned_ids={banned})
    assert all(sampler.sample(logits)[0] != banned for _ in range(5))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_an_error(value: float, temperature: float) -> None:
    logits = np.zeros(100, dtype=np.float32)
    logits[70] = value
    with pytest.raises(EngineError, match="not finite"):
        Sampler(SamplingParams(temperature=temperature), NOTHING).sample(logits)


@given(scale=st.sampled_from([1.0, 1e30, 3e38]), temperature=st.sampled_from([0.0, 0.01, 1.0]), data=st.data())
def test_extreme_logits_still_give_a_token(scale: float, temperature: float, data: st.DataObject) -> None:
    signs = data.draw(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=8))
    logits = np.array(signs, dtype=np.float32) * np.float32(scale)
    sampler = Sampler(SamplingParams(temperature=temperature, top_p=0.9, min_p=0.1), NOTHING)
    token_id, _ = sampler.sample(logits)
    assert logits[token_id] == logits.max() or scale == 1.0


@given(logits=logit_vectors, count=st.integers(1, 20))
def test_logprobs_are_the_models_own(logits: np.ndarray, count: int) -> None:
    params = SamplingParams(
        temperature=0.1, top_k=1, repetition_penalty=2, presence_penalty=2, logit_bias={0: 9}, logprobs=count
    )
    sampler = Sampler(params, np.array([0]), banned_ids={1})
    sampler.sample(logits)
    token_id, info = sampler.sample(logits)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), dim=-1).numpy()
    assert info is not None
    assert info.token_id == token_id
    assert info.logprob == pytest.approx(expected[token_id], abs=1e-5)
    assert len(info.top) == min(count, len(logits))
    np.testing.assert_allclose([p for _, p in info.top], np.sort(expected)[::-1][: len(info.top)], atol=1e-5)
    np.testing.assert_allclose([p for _, p in info.top], expected[[i for i, _ in info.top]], atol=1e-5)


def test_logprobs_are_given_only_when_asked_for() -> None:
    assert Sampler(SamplingParams(), NOTHING).sample(np.zeros(4, dtype=np.float32))[1] is None


def test_sampling_leaves_the_logits_alone() -> None:
    logits = np.random.default_rng(0).normal(size=64).astype(np.float32)
    logits.flags.writeable = False
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, top_k=5, top_p=0.5, repetition_penalty=2, logprobs=3)
        Sampler(params, np.array([1]), banned_ids={2}).sample(logits)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("max_tokens", None),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -0.1),
        ("temperature", "1"),
        ("temperature", False),
        ("temperature", 10**400),
        ("top_k", -1),
        ("top_k", 1.0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("min_p", -0.5),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.inf),
        ("seed", -1),
        ("seed", 1 << 64),
        ("seed", "lucky"),
        ("stop", [""]),
        ("stop", ["a", 1]),
        ("stop", ["a"] * 17),
        ("stop", ["a" * 257]),
        ("stop", 7),
        ("presence_penalty", 2.1),
        ("presence_penalty", -2.01),
        ("presence_penalty", math.nan),
        ("presence_penalty", True),
        ("presence_penalty", "1"),
        ("frequency_penalty", 3),
        ("frequency_penalty", -math.inf),
        ("frequency_penalty", None),
        ("logit_bias", {5: 100.5}),
        ("logit_bias", {5: -101}),
        ("logit_bias", {5: math.nan}),
        ("logit_bias", {5: True}),
        ("logit_bias", {5: "1"}),
        ("logit_bias", {5: None}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {True: 1}),
        ("logit_bias", {1.0: 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"05": 1}),
        ("logit_bias", {" 5": 1}),
        ("logit_bias", {"5\n": 1}),
        ("logit_bias", {"5.0": 1}),
        ("logit_bias", {"٥": 1}),
        ("logit_bias", {"": 1}),
        ("logit_bias", {"5": 1, 5: 1}),
        ("logit_bias", dict.fromkeys(range(1025), 1)),
        ("logit_bias", [[5, 1]]),
        ("logit_bias", None),
        ("min_tokens", -1),
        ("min_tokens", 1.0),
        ("min_tokens", True),
        ("min_tokens", 257),  # more than max_tokens
        ("n", 0),
        ("n", -1),
        ("n", 1.0),
        ("n", True),
        ("n", "2"),
        ("n", 65537),
        ("n", None),
        ("priority", 1 << 31),
        ("priority", 0.5),
        ("priority", None),
        ("logprobs", 21),
        ("logprobs", True),
        ("ignore_eos", 1),
        ("ignore_eos", "no"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(key: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams.from_dict({key: value})
    message = str(caught.value)
    assert message.startswith(f"sampling parameter {key} = ")
    assert "it is " in message
    assert "\n" not in message
    assert len(message) < 200


@pytest.mark.parametrize("key", ["temprature", "", "max_new_tokens", "a" * 1000, "two\nlines"])
def test_an_unknown_key_is_an_error_that_lists_the_known(key: str) -> None:
    with pytest.raises(RequestError, match=r"^unknown sampling parameter .*known are max_tokens") as caught:
        SamplingParams.from_dict({key: 1})
    assert "\n" not in str(caught.value)


def test_values_as_json_has_them() -> None:
    params = SamplingParams.from_dict({"temperature": 1, "top_p": 1, "stop": "END", "seed": None, "max_tokens": 5})
    assert params.stop == ("END",)
    assert SamplingParams.from_dict({"stop": ["a", "b"]}).stop == ("a", "b")
    assert SamplingParams.from_dict({"logit_bias": {"0": -100, "151935": 1}}).logit_bias == {0: -100, 151935: 1}
    assert SamplingParams.from_dict({"logit_bias": dict.fromkeys(range(1024), 1)})
    assert SamplingParams.from_dict({}) == SamplingParams()
