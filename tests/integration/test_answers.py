"""A real tritonserver answers what the same engine answers in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from live_server import ServerByName, ask_raw, make_image

from nvlm_trt.api import Answer, ChatRequest, Constraint, Message, SamplingParams, merge_answers
from nvlm_trt.runtime.pipeline import Pipeline
from nvlm_trt.runtime.sampling import answer_seed
from nvlm_trt.serving.client import AsyncClient, Client
from nvlm_trt.serving.grpc_messages import infer_request

ENGINES = ("nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny")
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
CONVERSATION = [
    Message("system", "Answer briefly."),
    Message("user", "Compare <image> with <image>."),
    Message("assistant", "They differ."),
    Message("user", "How?"),
]


@pytest.mark.parametrize("name", ENGINES)
def test_served_answers_equal_those_in_process(name: str, served: ServerByName, engine: Callable[[str], Path]) -> None:
    images = [make_image(1), make_image(2, 200, 60)]
    chats = [
        ChatRequest([Message("user", "What is this?")], images[:1], GREEDY),
        ChatRequest([Message("user", "Hello")], (), GREEDY),
        ChatRequest(CONVERSATION, images, GREEDY, max_tiles=2),
        ChatRequest([Message("user", "Hello")], (), SamplingParams(24, temperature=1.0, seed=7, ignore_eos=True)),
    ]
    with Pipeline.open(engine(name)) as pipeline:
        expected = [[t for delta in pipeline.generate(chat) for t in delta.token_ids] for chat in chats]
    with Client(served(name).address) as client:
        answers = [
            client.generate(messages=c.messages, images=c.images, sampling=c.sampling, max_tiles=c.max_tiles)
            for c in chats
        ]
    assert [answer.token_ids for answer in answers] == expected
    assert [answer.finish_reason for answer in answers] == ["length"] * 4
    usage = answers[2].usage
    assert usage is not None
    assert usage.image_tiles == 6  # two tiles and a thumbnail each
    assert usage.completion_tokens == 24


def test_a_served_answer_fits_its_constraint(served: ServerByName, engine: Callable[[str], Path]) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 22, None]}}, "required": ["n"]}
    bound = [
        SamplingParams(200, constraint=Constraint(json_schema={**schema, "additionalProperties": False})),
        SamplingParams(200, constraint=Constraint(regex="[a-z]{3} [0-9]{3}"), temperature=1.0, seed=1, n=3),
    ]
    with Pipeline.open(engine("nvlm-d-tiny")) as pipeline:
        chats = [ChatRequest([Message("user", "Hi")], [make_image(1)], sampling) for sampling in bound]
        expected = [[answer.text for answer in merge_answers(list(pipeline.generate(chat)))] for chat in chats]
    with Client(served("nvlm-d-tiny").address) as client:
        answers = [client.generate_all("Hi", images=[make_image(1)], sampling=sampling) for sampling in bound]
    assert [[answer.text for answer in several] for several in answers] == expected
    assert {answer.finish_reason for several in answers for answer in several} == {"stop"}
    assert json.loads(answers[0][0].text)["n"] in (1, 22, None)


def test_eight_concurrent_streams_answer_as_each_does_alone(served: ServerByName) -> None:
    """Different images, lengths and seeds; while they run together, their tiles are encoded together too."""
    requests = [
        {
            "prompt": "Describe it. " * (i + 1),
            "images": [make_image(100 + i, 60 + 20 * i, 90)],
            "sampling": SamplingParams(
                max_tokens=30 + 5 * i, temperature=0.0 if i % 2 else 1.0, seed=i, ignore_eos=True
            ),
        }
        for i in range(8)
    ]
    with Client(served("nvlm-h-tiny").address) as client, ThreadPoolExecutor(8) as pool:

        def ask(request: dict) -> Answer:
            return client.generate(**request)

        together = list(pool.map(ask, requests))
        alone = [ask(request) for request in requests]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [len(answer.token_ids) for answer in together] == [30 + 5 * i for i in range(8)]


def test_a_stream_is_the_answer_in_pieces(served: ServerByName) -> None:
    sampling = SamplingParams(max_tokens=40, ignore_eos=True, logprobs=2)
    with Client(served("nvlm-d-tiny").address) as client:
        whole = client.generate("What?", images=[make_image(3)], sampling=sampling)
        deltas = list(client.stream("What?", images=[make_image(3)], sampling=sampling))
    assert len(deltas) > 1
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [t for delta in deltas for t in delta.token_ids] == whole.token_ids
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == "length"
    assert [item.token_id for item in whole.logprobs] == whole.token_ids
    assert all(len(item.top) == 2 and np.isfinite(item.logprob) and item.logprob <= 0 for item in whole.logprobs)


@pytest.mark.parametrize("name", ENGINES)
def test_several_answers_are_those_of_single_requests_with_their_seeds(name: str, served: ServerByName) -> None:
    """The logprobs are compared too, with the text and bytes of each token: all that a response has but the times."""
    common: dict[str, Any] = {
        "max_tokens": 20,
        "temperature": 1.3,
        "presence_penalty": 1,
        "frequency_penalty": 0.5,
        "min_tokens": 5,
    }
    common |= {"logit_bias": {"65": -100, "66": 3}, "logprobs": 5}
    question = {"messages": CONVERSATION, "images": [make_image(31), make_image(32, 90, 200)]}
    with Client(served(name).address) as client:
        alone = [client.generate(**question, sampling={**common, "seed": answer_seed(9, i)}) for i in range(4)]
        deltas = list(client.stream(**question, sampling={**common, "seed": 9, "n": 4}))
        answers = client.generate_all(**question, sampling={**common, "seed": 9, "n": 4})
    assert len(answers) == 4
    for answer, own in zip(answers, alone, strict=True):
        assert answer.token_ids == own.token_ids
        assert answer.logprobs == own.logprobs
        assert (answer.text, answer.finish_reason) == (own.text, own.finish_reason)
        shown = [token for item in answer.logprobs for token in (item, *item.top)]
        assert all(token.text == token.utf8.decode(errors="replace") for token in shown if token.utf8)
        assert len(shown) == 6 * len(answer.token_ids)
        assert 65 not in answer.token_ids
    assert sorted(delta.index for delta in deltas if delta.finish_reason) == [0, 1, 2, 3]
    assert [delta.usage is None for delta in deltas] == [True] * (len(deltas) - 1) + [False]
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.completion_tokens == sum(len(answer.token_ids) for answer in alone)


def test_the_ensemble_streams_several_answers(served: ServerByName) -> None:
    sampling = {"max_tokens": 6, "temperature": 1, "seed": 2, "n": 3, "ignore_eos": True}
    request = infer_request("What?", images=[make_image(33)], sampling=sampling, model="nvlm_ensemble")
    with Client(served("nvlm-h-tiny").address) as client:
        expected = client.generate_all("What?", images=[make_image(33)], sampling=sampling)
    answers = merge_answers(ask_raw(served("nvlm-h-tiny"), request))
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]


def test_async_client_answers_the_same(served: ServerByName) -> None:
    address = served("nvlm-d-tiny").address

    async def ask() -> tuple[bool, list[Answer]]:
        async with AsyncClient(address) as client:
            asked = [client.generate("What?", images=[make_image(i)], sampling=GREEDY) for i in range(4)]
            return await client.ready(), await asyncio.gather(*asked)

    ready, answers = asyncio.run(ask())
    with Client(address) as client:
        expected = [client.generate("What?", images=[make_image(i)], sampling=GREEDY) for i in range(4)]
    assert ready
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]


@pytest.mark.parametrize("name", ENGINES)
def test_the_ensemble_called_directly_streams_the_same_answer(name: str, served: ServerByName) -> None:
    images = [make_image(11), make_image(12, 70, 200)]
    request = infer_request(messages=CONVERSATION, images=images, sampling=GREEDY, model="nvlm_ensemble")
    with Client(served(name).address) as client:
        deltas = ask_raw(served(name), request)
        expected = client.generate(messages=CONVERSATION, images=images, sampling=GREEDY)
    assert [t for delta in deltas for t in delta.token_ids] == expected.token_ids
    assert len(deltas) > 1
    # image tokens that a client sends must not become the cached image of another client
    assert expected.usage is not None
    assert expected.usage.cached_images == 0


def test_an_image_seen_before_skips_tiling_and_encoding(served: ServerByName) -> None:
    server = served("nvlm-x-tiny")
    statistics = tritonclient.grpc.InferenceServerClient(server.address.removeprefix("grpc://"))

    def executions() -> list[int]:
        models = statistics.get_inference_statistics(as_json=True)["model_stats"]
        counts = {model["name"]: int(model.get("execution_count", 0)) for model in models}
        return [counts["tiling"], counts["vision_encoder"]]

    with Client(server.address) as client:
        first = client.generate("What?", images=[make_image(21)], sampling=GREEDY)
        before = executions()
        second = client.generate("What?", images=[make_image(21)], sampling=GREEDY)
        assert executions() == before
        client.generate("What?", images=[make_image(21)], sampling=GREEDY, max_tiles=1)  # other tiles of the same image
        assert executions() == [count + 1 for count in before]
    assert second.token_ids == first.token_ids
    assert first.usage is not None
    assert second.usage is not None
    assert (first.usage.cached_images, second.usage.cached_images) == (0, 1)
    assert first.usage.image_tiles == second.usage.image_tiles > 1


def test_tiles_of_several_requests_are_encoded_as_one_batch(served: ServerByName) -> None:
    """Triton batches the tiles that wait while the encoder is busy, so requests are sent until a batch has several."""
    server = served("nvlm-d-tiny")
    statistics = tritonclient.grpc.InferenceServerClient(server.address.removeprefix("grpc://"))

    def encoder() -> tuple[int, int]:
        (model,) = statistics.get_inference_statistics("vision_encoder", as_json=True)["model_stats"]
        return int(model["inference_stats"]["success"]["count"]), int(model["execution_count"])

    first_requests, first_executions = encoder()
    with Client(server.address) as client, ThreadPoolExecutor(8) as pool:
        for attempt in range(20):
            images = [make_image(1000 + 8 * attempt + i) for i in range(8)]
            answers = pool.map(
                lambda image: client.generate("What?", images=[image], sampling={"max_tokens": 1}, max_tiles=1),
                images,
            )
            assert [answer.finish_reason for answer in answers] == ["length"] * 8
            requests, executions = encoder()
            assert requests - first_requests == 8 * (attempt + 1)
            if executions - first_executions < requests - first_requests:
                return
    pytest.fail(f"{requests - first_requests} requests took {executions - first_executions} executions")


def test_another_client_library_gets_the_answer(served: ServerByName) -> None:
    """NVIDIA's own client sends the tensors that the model's configuration names."""
    server = served("nvlm-h-tiny")
    client = tritonclient.grpc.InferenceServerClient(server.address.removeprefix("grpc://"))

    def strings(name: str, *values: bytes) -> tritonclient.grpc.InferInput:
        tensor = tritonclient.grpc.InferInput(name, [len(values)], "BYTES")
        tensor.set_data_from_numpy(np.array(values, np.object_))
        return tensor

    sampling = json.dumps({"max_tokens": 5, "ignore_eos": True}).encode()
    inputs = [strings("prompt", b"What?"), strings("image", make_image(1)), strings("sampling_parameters", sampling)]
    answers: list[tuple] = []
    client.start_stream(callback=lambda result, error: answers.append((result, error)))
    client.async_stream_infer("nvlm", inputs, request_id="7")
    client.stop_stream()  # waits for the answer
    assert [error for _, error in answers] == [None] * len(answers)
    token_ids = [int(t) for result, _ in answers for t in result.as_numpy("token_ids")]
    with Client(server.address) as own:
        assert token_ids == own.generate("What?", images=[make_image(1)], sampling=json.loads(sampling)).token_ids
