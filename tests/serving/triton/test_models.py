"""Tests the logic of Triton's python models without a server; tests/integration runs the models in a real one."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_pb_utils import FINAL, InferenceResponse, Request, ResponseSender, Tensor, TritonError, fake_pb_utils, strings
from PIL import Image

from nvlm_trt.api import Delta, ImagePart, Message, SamplingParams, TextPart, Usage
from nvlm_trt.backends.opening import open_backend, runtimes_here
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError, ImageError, QueueFullError, RequestError
from nvlm_trt.image.decoding import load_image
from nvlm_trt.image.tiling import cut_tiles, normalise_tiles, tile_image
from nvlm_trt.runtime.request import Request as RuntimeRequest
from nvlm_trt.runtime.request import State
from nvlm_trt.serving.triton.drain_channel import ENCODED, IDLE, DrainChannel
from nvlm_trt.serving.triton.models.answer_sender import AnswerSender, Event
from nvlm_trt.serving.triton.models.chat import ChatModel
from nvlm_trt.serving.triton.models.chat_request import read_chat
from nvlm_trt.serving.triton.models.image_encoder import ImageEncoder
from nvlm_trt.serving.triton.models.packed_tiles import pack_tiles, unpack_tiles
from nvlm_trt.serving.triton.models.responses import Responses
from nvlm_trt.serving.triton.models.tiling import TilingModel
from nvlm_trt.serving.triton.models.vision_encoder import VisionEncoderModel

WAIT = 20.0
CHANNELS: list[DrainChannel] = []  # kept open: a model whose supervisor has ended ends its process group
USAGE = Usage(1, 1, 0, 0, 0, 0.0, 0.0, 0.0, 0.0)


def png(width: int, height: int) -> bytes:
    encoded = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).save(encoded, "PNG")
    return encoded.getvalue()


def arguments(**parameters: object) -> dict[str, str]:
    """Makes the argument of `initialize`."""
    entries = {name: {"string_value": str(value)} for name, value in parameters.items()}
    return {"model_config": json.dumps({"parameters": entries})}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- requests ----------------------------------------------------------------------------------------------------


def test_read_chat() -> None:
    content = [{"type": "text", "text": "See"}, {"type": "image"}]
    request = Request(
        messages=strings(json.dumps([{"role": "user", "content": content}]).encode()),
        image=strings(b"one"),
        sampling_parameters=strings(b'{"max_tokens": 3}'),
        max_tiles=np.array([2], np.int32),
    )
    chat = read_chat(fake_pb_utils(), request, lambda tensor: tensor)
    assert chat.messages == [Message("user", [TextPart("See"), ImagePart()])]
    assert (chat.images, chat.sampling, chat.max_tiles) == ([b"one"], SamplingParams(3), 2)


def test_image_tokens_of_several_images_are_split() -> None:
    tokens = np.arange(5 * 2 * 3, dtype=np.float32).reshape(5, 2, 3)
    inputs = {"prompt": strings(b"Hi"), "image_tokens": tokens, "tiles_per_image": np.array([2, 3], np.int32)}
    chat = read_chat(fake_pb_utils(), Request(**inputs), lambda tensor: tensor.as_numpy().copy())
    np.testing.assert_array_equal(chat.images[0], tokens[:2])
    np.testing.assert_array_equal(chat.images[1], tokens[2:])
    for tiles in ([2, 2], [0, 5], [6, -1], []):
        inputs["tiles_per_image"] = np.array(tiles, np.int32)
        with pytest.raises(RequestError, match="does not describe image_tokens of 5 tiles"):
            read_chat(fake_pb_utils(), Request(**inputs), lambda tensor: tensor.as_numpy())
    inputs |= {"tiles_per_image": np.array([5], np.int32), "image": strings(b"one")}
    with pytest.raises(RequestError, match="send images as `image`"):
        read_chat(fake_pb_utils(), Request(**inputs), lambda tensor: tensor.as_numpy())


# --- answers -----------------------------------------------------------------------------------------------------


class Asked:
    """One request that an AnswerSender answers."""

    def __init__(self, answers: AnswerSender, stream: bool = True, image_bytes: int = 0, n: int = 1) -> None:
        self.sender = ResponseSender()
        self.request = RuntimeRequest(SamplingParams(), print, print)
        self.put: Callable[[Event], None]
        answers.answer(self.sender, self._submit, stream, image_bytes, n)

    def _submit(self, put: Callable[[Event], None]) -> RuntimeRequest:
        self.put = put
        return self.request

    @property
    def texts(self) -> list[str]:
        responses = [response for response, _ in self.sender.sent if response is not None]
        return [r.tensors["text"].as_numpy()[0].decode() for r in responses if not r.has_error()]


@pytest.fixture
def late() -> list[int]:
    return []


@pytest.fixture
def answers(late: list[int]) -> Iterator[AnswerSender]:
    pb_utils = fake_pb_utils()
    sender = AnswerSender(pb_utils, Responses(pb_utils), late.append)
    yield sender
    sender.close()


def test_deltas_are_sent_in_order_and_the_last_is_final(answers: AnswerSender) -> None:
    asked = Asked(answers)
    for text in "abc":
        asked.put(Delta(text, [ord(text)]))
    asked.put(Delta("d", [100], finish_reason="stop", usage=USAGE))
    wait_until(lambda: asked.sender.ended)
    assert "".join(asked.texts) == "abcd"
    assert [flags for _, flags in asked.sender.sent[:-1]] == [0] * (len(asked.sender.sent) - 1)
    wait_until(lambda: answers.open_requests == 0)


def test_several_answers_have_responses_of_their_own_and_the_last_is_final(answers: AnswerSender) -> None:
    asked = Asked(answers, n=3)
    # handed over at once, so that deltas of one answer are joined
    answers._events.put(None)
    answers._thread.join()
    for index, text in ((0, "a"), (1, "b"), (2, "c"), (0, "d")):
        asked.put(Delta(text, [ord(text)], index=index))
    asked.put(Delta("e", [101], index=1, finish_reason="stop"))
    asked.put(Delta("f", [102], index=0, finish_reason="length"))
    asked.put(Delta("g", [103], index=2, finish_reason="stop", usage=USAGE))
    answers._events.put(None)
    answers._run()
    received = [
        [response.tensors[name].as_numpy()[0] for name in ("index", "text", "finish_reason")]
        for response, _ in asked.sender.sent
        if response is not None
    ]
    assert received == [[1, b"be", b"stop"], [0, b"adf", b"length"], [2, b"cg", b"stop"]]
    assert [flags for _, flags in asked.sender.sent] == [0, 0, FINAL]
    assert answers.open_requests == 0


def test_an_end_of_one_of_several_answers_is_not_final(answers: AnswerSender) -> None:
    asked = Asked(answers, n=2)
    asked.put(Delta("a", [97], index=1, finish_reason="stop"))
    wait_until(lambda: len(asked.sender.sent) == 1)
    assert not asked.sender.ended
    asked.put(EngineError("it failed"))
    wait_until(lambda: asked.sender.ended)
    assert [flags for _, flags in asked.sender.sent] == [0, FINAL]


def test_an_error_after_deltas_is_the_last_response(answers: AnswerSender) -> None:
    asked = Asked(answers)
    asked.put(Delta("a", [97]))
    asked.put(EngineError("it failed"))
    wait_until(lambda: asked.sender.ended)
    assert asked.texts == ["a"]
    response, _ = asked.sender.sent[-1]
    assert response is not None
    assert response.error().message() == "it failed"  # type: ignore[union-attr]


def test_a_cancelled_request_is_told_and_its_late_tokens_are_counted(answers: AnswerSender, late: list[int]) -> None:
    asked = Asked(answers)
    asked.sender.cancelled = True
    wait_until(lambda: asked.request.cancelled)  # although it has nothing to send
    asked.put(Delta("late", [1, 2]))
    asked.put(Delta("", [], finish_reason="cancelled"))
    wait_until(lambda: asked.sender.ended)
    assert asked.texts == []  # an empty final response alone
    assert late == [2, 0]


def test_an_answer_that_cannot_be_sent_ends_alone(answers: AnswerSender) -> None:
    broken, sound = Asked(answers), Asked(answers)
    broken.sender.send_raises = OSError("gone")
    broken.put(Delta("a", [97]))
    wait_until(lambda: broken.request.cancelled)
    sound.put(Delta("a", [97], finish_reason="stop"))
    wait_until(lambda: sound.sender.ended)
    assert not sound.request.cancelled
    wait_until(lambda: answers.open_requests == 0)


@pytest.mark.parametrize("ends_with", ["stop", "error"])
def test_an_answer_that_is_not_streamed_is_one_response(answers: AnswerSender, ends_with: str) -> None:
    asked = Asked(answers, stream=False)
    for text in "abc":
        asked.put(Delta(text, [ord(text)]))
        wait_until(answers._events.empty)
    assert not asked.sender.sent
    stop = Delta("d", [100], finish_reason="stop", usage=USAGE)
    asked.put(stop if ends_with == "stop" else EngineError("it failed"))
    wait_until(lambda: asked.sender.ended)
    ((response, flags),) = asked.sender.sent
    assert response is not None
    assert flags == FINAL
    if ends_with == "stop":
        assert response.tensors["text"].as_numpy().tolist() == [b"abcd"]
        assert response.tensors["token_ids"].as_numpy().tolist() == [97, 98, 99, 100]
        assert response.tensors["finish_reason"].as_numpy().tolist() == [b"stop"]
    else:
        assert response.error().message() == "it failed"  # type: ignore[union-attr]


def test_an_answer_that_is_not_streamed_can_be_cancelled(answers: AnswerSender, late: list[int]) -> None:
    asked = Asked(answers, stream=False)
    asked.put(Delta("a", [97]))
    asked.sender.cancelled = True
    wait_until(lambda: asked.request.cancelled)
    asked.put(Delta("", [], finish_reason="cancelled"))
    wait_until(lambda: asked.sender.ended)
    assert asked.sender.sent == [(None, FINAL)]
    assert late == [0]


def test_a_request_that_is_refused_at_once_is_not_open(answers: AnswerSender) -> None:
    def refuse(put: Callable[[Event], None]) -> RuntimeRequest:
        raise QueueFullError("full")

    with pytest.raises(QueueFullError):
        answers.answer(ResponseSender(), refuse)
    assert answers.open_requests == 0


def test_closing_sends_what_was_handed_over() -> None:
    pb_utils = fake_pb_utils()
    sender = AnswerSender(pb_utils, Responses(pb_utils), print)
    asked = [Asked(sender) for _ in range(5)]
    for each in asked:
        each.put(Delta("a", [97], finish_reason="stop"))
    sender.close()
    assert all(each.sender.ended for each in asked)


def test_images_that_wait_are_counted_until_they_are_encoded(answers: AnswerSender) -> None:
    asked = Asked(answers, image_bytes=7)
    assert (answers.encoding_requests, answers.held_image_bytes) == (1, 7)
    asked.request.state = State.READY
    assert (answers.encoding_requests, answers.held_image_bytes) == (0, 0)


def test_empty_tensors_are_made_once() -> None:
    responses = Responses(fake_pb_utils())
    responses.of_delta(Delta("a", [97]))
    before = Tensor.made
    responses.of_delta(Delta("b", [98]))
    assert Tensor.made - before == 2  # text and token_ids


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RequestError("bad"), TritonError.INVALID_ARG, "invalid request: bad"),
        (ImageError("bad"), TritonError.INVALID_ARG, "invalid request: bad"),
        (QueueFullError("full"), TritonError.UNAVAILABLE, "queue full: full"),
        (EngineError("broken"), TritonError.INTERNAL, "broken"),
        (ValueError("a defect"), TritonError.INTERNAL, "internal error (ValueError); the server's log has the details"),
    ],
)
def test_errors_have_their_codes(error: Exception, code: str, message: str) -> None:
    pb_utils = fake_pb_utils()
    told = Responses(pb_utils).of_error(error).error()
    assert (told.code, told.message()) == (code, message)
    assert bool(pb_utils.logged) == isinstance(error, ValueError)


# --- images ------------------------------------------------------------------------------------------------------


def tiling(image_type: str = "TYPE_FP32") -> TilingModel:
    model = TilingModel(fake_pb_utils())
    model.initialize(tiling_arguments(image_type))
    return model


def tiling_arguments(image_type: str = "TYPE_FP32") -> dict[str, str]:
    return arguments(image_type=image_type, tile_size=56, max_tiles=6, max_pixels=10**6, max_bytes=10**6, max_images=2)


@pytest.mark.parametrize("image_type", ["TYPE_FP32", "TYPE_FP16", "TYPE_BF16"])
def test_tiling(image_type: str) -> None:
    images = [png(168, 112), png(56, 56)]
    (response,) = tiling(image_type).execute([Request(image=strings(*images))])
    assert not response.has_error()
    assert response.tensors["tiles_per_image"].as_numpy().tolist() == [7, 1]
    expected = torch.from_numpy(np.concatenate([tile_image(load_image(data), 56, 6) for data in images]))
    types = {"TYPE_FP32": torch.float32, "TYPE_FP16": torch.float16, "TYPE_BF16": torch.bfloat16}
    pixels = torch.as_tensor(response.tensors["pixel_values"].as_numpy())
    assert pixels.dtype == types[image_type]
    assert torch.equal(pixels, expected.to(types[image_type]))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "the request has 0 images, 1 to 2 are allowed"),
        ({"image": strings(*[png(56, 56)] * 3)}, "the request has 3 images, at most 2"),
        ({"image": strings(b"text")}, "image: not a readable"),
        ({"image": strings(png(56, 56), b"text")}, "image 2: not a readable"),
        ({"image": strings(png(56, 56)), "max_tiles": np.array([7], np.int32)}, "max_tiles = 7"),
    ],
)
def test_tiling_refuses(inputs: dict[str, np.ndarray], message: str) -> None:
    model = tiling()
    refused, answered = model.execute([Request(**inputs), Request(image=strings(png(56, 56)))])
    assert refused.error().code == TritonError.INVALID_ARG
    assert message in refused.error().message()
    assert not answered.has_error()


def test_tiles_that_nvlm_has_cut_are_not_cut_again() -> None:
    model = TilingModel(fake_pb_utils())
    model.initialize({**tiling_arguments(), "model_version": "2"})
    cut = [cut_tiles(load_image(data), 56, 6) for data in (png(168, 112), png(56, 56))]
    packed, encoded = model.execute(
        [Request(image=strings(*map(pack_tiles, cut))), Request(image=strings(png(168, 112)))]
    )
    assert packed.tensors["tiles_per_image"].as_numpy().tolist() == [7, 1]
    expected = normalise_tiles(np.concatenate(cut))
    np.testing.assert_array_equal(packed.tensors["pixel_values"].as_numpy(), expected)
    assert "only nvlm calls this model" in encoded.error().message()


@pytest.mark.parametrize("count", [0, 8])
@pytest.mark.parametrize("edge", [56, 57])
def test_packed_tiles_have_to_fit(count: int, edge: int) -> None:
    packed = pack_tiles(np.zeros((count, 3, edge, edge), np.uint8))
    with pytest.raises(ImageError, match="packed tiles that do not fit"):
        unpack_tiles(packed, 56, 7)
    with pytest.raises(ImageError, match="packed tiles that do not fit"):
        unpack_tiles(pack_tiles(np.zeros((1, 3, 56, 56), np.uint8))[:-1], 56, 7)


def test_vision_encoder_gives_each_request_its_tokens(engine: Callable[[str], Path]) -> None:
    pb_utils = fake_pb_utils()
    model = VisionEncoderModel(pb_utils)
    path = engine("nvlm-d-tiny")
    model.initialize(arguments(engine=path, threads=1, niceness=0))
    assert pb_utils.informed == [f"vision_encoder: {runtimes_here(Engine.open(path))['vision_encoder']}"]
    noise = np.random.default_rng(0).standard_normal((4, 3, 56, 56), dtype=np.float32)
    responses = model.execute([Request(pixel_values=noise[:1]), Request(pixel_values=noise[1:])])
    model.finalize()
    with open_backend(Engine.open(path), ["vision_encoder"], threads=1) as backend:
        expected = backend.to_host(backend.encode(noise))
    got = [response.tensors["image_tokens"].as_numpy() for response in responses]
    assert [len(tokens) for tokens in got] == [1, 3]
    np.testing.assert_array_equal(np.concatenate(got), expected)


def test_image_encoder_asks_the_ensemble_and_keeps_the_kind_of_its_errors() -> None:
    requests: list[SimpleNamespace] = []
    answer = InferenceResponse([Tensor("image_tokens", np.zeros((1, 2, 3)))])

    def run(request: SimpleNamespace) -> InferenceResponse:
        requests.append(request)
        return answer

    encoder = ImageEncoder(fake_pb_utils(run))
    assert encoder.encode(b"png", 4) is answer.tensors["image_tokens"]
    sent = {tensor.name(): tensor.as_numpy().tolist() for tensor in requests[0].inputs}
    assert (requests[0].model_name, sent) == ("image_encoder", {"image": [b"png"], "max_tiles": [4]})
    errors = {"invalid request: image: not a readable": ImageError, "CUDA out of memory": EngineError}
    for message, kind in errors.items():
        answer = InferenceResponse(error=TritonError(f"in ensemble 'image_encoder', {message}"))
        with pytest.raises(kind):
            encoder.encode(b"png", 4)


# --- the model that clients call ---------------------------------------------------------------------------------


def test_chat_model(engine: Callable[[str], Path]) -> None:
    """Answers about an image that another model encodes, refuses a request, and drains."""
    path, channel = engine("nvlm-h-tiny"), DrainChannel()
    CHANNELS.append(channel)
    with open_backend(Engine.open(path), ["vision_encoder"], threads=1) as backend:

        def run(request: SimpleNamespace) -> InferenceResponse:
            (packed,), (most,) = (tensor.as_numpy() for tensor in request.inputs)
            tiles = unpack_tiles(packed, 56, int(most) + 1)
            tokens = backend.to_host(backend.encode(normalise_tiles(tiles)))
            return InferenceResponse([Tensor("image_tokens", tokens)])

        pb_utils = fake_pb_utils(run)
        pb_utils.MetricFamily = FakeFamily
        model = ChatModel(pb_utils)
        limits = {"max_pixels": 10**6, "max_bytes": 10**6, "max_images": 2}
        model.initialize(
            arguments(
                engine=path,
                threads=1,
                max_queue=4,
                encode_workers=2,
                drain_descriptor=os.dup(channel.descriptor),
                **limits,
            )
        )
        sender, refused, drained = ResponseSender(), ResponseSender(), ResponseSender()
        sampling = strings(b'{"max_tokens": 5, "ignore_eos": true}')
        image = strings(png(168, 112))
        too_much, most = ResponseSender(), 2 * 2 * 10**6  # bytes of the largest two requests
        model.execute([Request(too_much, prompt=strings(b"Hi"), image=strings(bytes(most + 1)))])
        model.execute(
            [
                Request(sender, prompt=strings(b"What is it?"), image=image, sampling_parameters=sampling),
                Request(refused, prompt=strings(b"")),
            ]
        )
        wait_until(lambda: sender.ended and FakeFamily.values.get("nvlm_generated_tokens_total") == 5)
        wait_until(lambda: len(FakeFamily.observed.get("nvlm_request_image_tiles", ())) == 1)
        wait_until(lambda: FakeFamily.values["nvlm_refused_requests_total"] == 2)
        channel.tell()
        assert all(channel.wait_for(message, give_up=lambda: False) for message in (ENCODED, IDLE))
        model.execute([Request(drained, prompt=strings(b"Hi"))])
        model.finalize()
    last = sender.sent[-1][0]
    assert last is not None
    usage = json.loads(last.tensors["usage"].as_numpy()[0])
    assert (usage["completion_tokens"], usage["image_tiles"]) == (5, 7)
    assert FakeFamily.observed["nvlm_request_image_tiles"] == [7]
    assert FakeFamily.observed["nvlm_request_prompt_tokens"] == [usage["prompt_tokens"]]
    assert FakeFamily.observed["nvlm_request_queue_time_seconds"] == [usage["queue_s"]]
    assert len(FakeFamily.observed["nvlm_inter_token_latency_seconds"]) == 4
    (first,), (whole,) = (
        FakeFamily.observed[f"nvlm_{name}_seconds"] for name in ("time_to_first_token", "e2e_request_latency")
    )
    assert usage["ttft_s"] <= first < whole
    assert whole == pytest.approx(first + sum(FakeFamily.observed["nvlm_inter_token_latency_seconds"]))
    for sent, message in (
        (too_much, "the images that wait to be encoded have 0 MiB"),
        (refused, "the prompt is empty"),
        (drained, "the server is stopping"),
    ):
        ((response, flags),) = sent.sent
        assert flags == FINAL
        assert response is not None
        assert message in response.error().message()  # type: ignore[union-attr]


class FakeFamily:
    """A metric family whose values can be read."""

    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
    values: dict[str, float] = {}  # noqa: RUF012
    observed: dict[str, list[float]] = {}  # noqa: RUF012
    _lock = threading.Lock()

    def __init__(self, name: str, description: str, kind: str) -> None:
        if kind != self.HISTOGRAM:
            assert kind == (self.COUNTER if name.endswith("_total") else self.GAUGE)
        self._name = name

    def Metric(self, labels: dict[str, str], buckets: list[float] | None = None) -> Any:  # noqa: N802
        return SimpleNamespace(increment=self._add, set=self._set, observe=self._observe)

    def _observe(self, value: float) -> None:
        self.observed.setdefault(self._name, []).append(value)

    def _add(self, value: float) -> None:
        with self._lock:
            self.values[self._name] = self.values.get(self._name, 0) + value

    def _set(self, value: float) -> None:
        self.values[self._name] = value
