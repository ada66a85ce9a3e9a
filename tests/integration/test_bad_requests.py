"""A client's mistake is told in one line, and the server lives on."""

from __future__ import annotations

import io
import json
import struct
import urllib.error
import urllib.request
import zlib
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from live_server import ServerByName, ask_raw, make_image
from PIL import Image
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from nvlm_trt.api import Message
from nvlm_trt.errors import RequestError, ServerError
from nvlm_trt.serving.client import Client
from nvlm_trt.serving.grpc_messages import infer_request
from nvlm_trt.serving.triton.server import TritonServer

USER = Message("user", "What is this?")


@pytest.fixture(scope="module")
def server(served: ServerByName) -> TritonServer:
    return served("nvlm-x-tiny")


def png(width: int, height: int) -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (width, height)).save(encoded, "PNG")
    return encoded.getvalue()


def png_header(width: int, height: int) -> bytes:
    """Makes a PNG whose header states a size, without pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + png(1, 1)[33:]


IMAGES = {
    "not an image": (b"this is text", "not a readable"),
    "empty": (b"", "0 bytes"),
    "truncated": (make_image(1)[:300], "truncated or corrupt"),
    "zero-sized": (png_header(0, 10), ""),
    "one pixel high": (png(300, 1), "300 x 1"),
    "decompression bomb": (png_header(30_000, 30_000), "30000 x 30000 pixels, at most 64000000"),
    "over 64 megapixels": (png_header(9_000, 9_000), "9000 x 9000"),
    "over 32 MiB": (make_image(1) + bytes(32 << 20), "at most 33554432"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_a_bad_image_is_named(kind: str, server: TritonServer) -> None:
    image, expected = IMAGES[kind]
    assert_rejected(server, expected, prompt="Compare", images=[make_image(1), image], names="image 2: ")


CHATS: dict[str, tuple[dict[str, Any], str]] = {
    "40 images": ({"prompt": "Hi", "images": [make_image(1)] * 40}, "40 images, at most 16"),
    "empty prompt": ({"prompt": ""}, "empty"),
    "no messages": ({"messages": []}, "messages must be a non-empty list"),
    "unknown role": ({"messages": [{"role": "robot", "content": "Hi"}]}, "robot"),
    "neither prompt nor messages": ({}, "exactly one of the inputs"),
    "both prompt and messages": ({"prompt": "Hi", "messages": [USER]}, "exactly one of the inputs"),
    "fewer images than marks": ({"prompt": "<image> <image>", "images": [make_image(1)]}, "<image>"),
    "half a surrogate pair": ({"prompt": "\ud800"}, "not UTF-8"),
    "prompt too long": ({"prompt": "word " * 2000}, "the engine holds 4096"),
    "too many image tokens": (
        {"prompt": "Hi", "images": [make_image(i, 300, 200) for i in range(12)]},
        "the engine holds",
    ),
    "no answer": ({"prompt": "Hi", "sampling": {"n": 0}}, "n = 0"),
    "more answers than slots": (
        {"prompt": "Hi", "sampling": {"n": 9}},
        "n = 9 is not allowed; it is an integer from 1",
    ),
    "min_tokens over max_tokens": (
        {"prompt": "Hi", "sampling": {"max_tokens": 3, "min_tokens": 4}},
        "min_tokens = 4 is not allowed; it is at most max_tokens, 3",
    ),
    "a bias of an unknown token": ({"prompt": "Hi", "sampling": {"logit_bias": {"512": 1}}}, "the token id 512"),
    "a bias of a token by name": ({"prompt": "Hi", "sampling": {"logit_bias": {"<|im_end|>": 1}}}, "logit_bias ="),
    "a bias against everything": (
        {"prompt": "Hi", "sampling": {"logit_bias": {str(token_id): -100 for token_id in range(512)}}},
        "bans every token",
    ),
    "a penalty out of bounds": ({"prompt": "Hi", "sampling": {"presence_penalty": -3}}, "presence_penalty = -3"),
    "an impossible schema": (
        {"prompt": "Hi", "sampling": {"constraint": {"json_schema": {"type": "text"}}}},
        "constraint.json_schema cannot be followed: Invalid type: text",
    ),
    "a regular expression of ten gigabytes": (
        {"prompt": "Hi", "sampling": {"constraint": {"regex": "a{100000000}"}}, "images": [make_image(1)]},
        "at most 2000 are allowed",
    ),
    "a choice of nothing": ({"prompt": "Hi", "sampling": {"constraint": {"choice": []}}}, "constraint.choice"),
    "a constraint without an end": (
        {"prompt": "Hi", "sampling": {"constraint": {"regex": "a"}, "ignore_eos": True}},
        "ignore_eos = True is not allowed with constraint",
    ),
    "negative max_tokens": ({"prompt": "Hi", "sampling": {"max_tokens": -1}}, "max_tokens = -1"),
    "NaN temperature": ({"prompt": "Hi", "sampling": {"temperature": float("nan")}}, "temperature = nan"),
    "unknown sampling key": ({"prompt": "Hi", "sampling": {"heat": 1}}, "unknown sampling parameter 'heat'"),
    "max_tiles of 0": ({"prompt": "Hi", "images": [make_image(1)], "max_tiles": 0}, "max_tiles = 0"),
    "max_tiles over the engine's": ({"prompt": "Hi", "images": [make_image(1)], "max_tiles": 99}, "max_tiles = 99"),
}


@pytest.mark.parametrize("kind", CHATS)
def test_a_bad_request_is_explained(kind: str, server: TritonServer) -> None:
    chat, expected = CHATS[kind]
    assert_rejected(server, expected, **chat)


def assert_rejected(server: TritonServer, expected: str, names: str = "", **chat: Any) -> None:
    with Client(server.address) as client:
        with pytest.raises(RequestError) as raised:
            list(client.stream(**chat))
        message = str(raised.value)
        assert message.startswith(names)
        assert expected in message
        assert "\n" not in message
        assert "nvlm_ensemble" not in message
        assert client.generate("Hi", sampling={"max_tokens": 2, "ignore_eos": True}).token_ids
    server.check()


RAW: dict[str, tuple[dict[str, bytes], str]] = {
    "sampling parameters that are not JSON": ({"prompt": b"Hi", "sampling_parameters": b"{"}, "not JSON"),
    "sampling parameters that are a list": ({"prompt": b"Hi", "sampling_parameters": b"[]"}, "JSON object"),
    "an integer of 5000 digits": ({"prompt": b"Hi", "sampling_parameters": b'{"seed":' + b"9" * 5000 + b"}"}, "JSON"),
    "messages that are not JSON": ({"messages": b"Hi"}, "not JSON"),
    "messages nested without end": ({"messages": b"[" * 100_000}, "not JSON"),
    "a prompt of 20 MB": ({"prompt": b"word " * 4_000_000}, "20000000 characters"),
    "a prompt that is not UTF-8": ({"prompt": b"\xff\xfe"}, "not UTF-8"),
}


@pytest.mark.parametrize("kind", RAW)
def test_bad_tensors_are_explained(kind: str, server: TritonServer) -> None:
    tensors, expected = RAW[kind]
    request = service_pb2.ModelInferRequest(model_name="nvlm")
    for name, value in tensors.items():
        request.inputs.add(name=name, datatype="BYTES", shape=[1])
        request.raw_input_contents.append(struct.pack("<I", len(value)) + value)
    assert_invalid(server, request, expected)


def test_an_unknown_input_is_an_error(server: TritonServer) -> None:
    request = infer_request("Hi")
    request.inputs.add(name="temperature", datatype="FP32", shape=[1])
    request.raw_input_contents.append(bytes(4))
    with pytest.raises(ServerError, match="unexpected inference input 'temperature'"):
        ask_raw(server, request)


def test_image_tokens_from_outside_are_checked(server: TritonServer) -> None:
    """Clients may send tensors that only the ensemble should send: they must not do harm."""
    request = infer_request("Hi")
    request.inputs.add(name="image_tokens", datatype="FP32", shape=[2, 16, 192])
    request.raw_input_contents.append(bytes(2 * 16 * 192 * 4))
    request.inputs.add(name="tiles_per_image", datatype="INT32", shape=[1])
    request.raw_input_contents.append(struct.pack("<i", 3))
    assert_invalid(server, request, "tiles_per_image [3]")
    request.raw_input_contents[-1] = struct.pack("<i", 2)
    assert ask_raw(server, request)
    request.inputs.add(name="image", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(struct.pack("<I", 2) + b"??")
    assert_invalid(server, request, "send images as `image`")


def assert_invalid(server: TritonServer, request: service_pb2.ModelInferRequest, expected: str) -> None:
    with pytest.raises(RequestError) as raised:
        ask_raw(server, request)
    assert expected in str(raised.value)
    with Client(server.address) as client:
        assert client.generate("Hi", sampling={"max_tokens": 2, "ignore_eos": True}).token_ids
    server.check()


def test_a_bad_image_is_an_error_of_the_ensemble_too(server: TritonServer) -> None:
    request = infer_request("Compare", images=[make_image(1), b"this is text"], model="nvlm_ensemble")
    assert_invalid(server, request, "image 2: not a readable")


@pytest.mark.parametrize("max_tiles", [None, 1])
@pytest.mark.parametrize("model", ["nvlm_ensemble", "tiling"])
def test_a_missing_image_is_an_error(model: str, max_tiles: int | None, server: TritonServer) -> None:
    request = infer_request("Hi" if model == "nvlm_ensemble" else None, max_tiles=max_tiles, model=model)
    assert_invalid(server, request, "the request has 0 images")


def test_protocols_that_reach_into_the_server_are_closed(server: TritonServer) -> None:
    client = tritonclient.grpc.InferenceServerClient(server.address.removeprefix("grpc://"))
    closed = [
        lambda: client.register_system_shared_memory("region", "/anything", 64),
        lambda: client.get_system_shared_memory_status(),
        lambda: client.get_model_repository_index(),
        lambda: client.unload_model("nvlm"),
        lambda: client.load_model("nvlm"),
        lambda: client.update_log_settings({"log_verbose_level": 1}),
        lambda: client.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"]}),
    ]
    for call in closed:
        with pytest.raises(InferenceServerException, match="restricted"):
            call()
    for path in ("/v2/systemsharedmemory/status", "/v2/logging", "/v2/trace/setting"):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(server.http_address + path)
    assert client.is_model_ready("nvlm")
    assert np.isfinite(client.get_inference_statistics("nvlm").model_stats[0].last_inference)


BESIDE: dict[str, tuple[dict[str, Any], str]] = {
    "a sampling parameter": ({"max_tokens": 5}, "'max_tokens' has no effect there; put it into the input sampling_par"),
    "an unknown one": ({"heat": "1"}, "unknown request parameter 'heat'"),
    "a timeout": ({"timeout": 1_000_000}, "'timeout' is not supported"),
    "a sequence": ({"sequence_id": 7}, "'sequence_id'"),
    "the start of a sequence": ({"sequence_start": True}, "'sequence_start'"),
}


@pytest.mark.parametrize("model", ["nvlm", "nvlm_ensemble"])
@pytest.mark.parametrize("kind", BESIDE)
def test_a_parameter_beside_the_inputs_is_explained(kind: str, model: str, server: TritonServer) -> None:
    parameters, expected = BESIDE[kind]
    request = infer_request("Hi", images=[make_image(1)], model=model)
    for name, value in parameters.items():
        field = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
        setattr(request.parameters[name], field, value)
    assert_invalid(server, request, expected)


def test_what_triton_itself_honours_is_no_error(server: TritonServer) -> None:
    request = infer_request("Hi", sampling={"max_tokens": 1})
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    assert ask_raw(server, request)


@pytest.mark.parametrize("path", ["generate", "generate_stream"])
@pytest.mark.parametrize(
    "beside", [{"max_tokens": 5}, {"parameters": {"max_tokens": 5}}, {"parameters": {"timeout": 5}}, {"priority": 3}]
)
def test_a_parameter_over_http_is_explained(path: str, beside: dict[str, Any], server: TritonServer) -> None:
    url = f"{server.http_address}/v2/models/nvlm/{path}"

    def post(**body: Any) -> bytes:
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        return opener.open(request, timeout=60).read()

    with pytest.raises(urllib.error.HTTPError) as raised:
        post(prompt="Hi", **beside)
    name = next(iter(beside.get("parameters", beside)))
    assert raised.value.code == 400
    assert f"request parameter '{name}'" in raised.value.read().decode()
    if path == "generate_stream":
        assert b"finish_reason" in post(prompt="Hi", sampling_parameters='{"max_tokens": 1}')


NOT_UTF8 = {
    "a parameter's name": (b'{"prompt": "Hi", "max_tok\xe9ns": 5}', "a request parameter is not UTF-8"),
    "a parameter's value": (b'{"prompt": "Hi", "max_tokens": "f\xfcnf"}', "request parameter"),
    "the id": (b'{"prompt": "Hi", "id": "\xff"}', "a request parameter is not UTF-8"),
    "the sequence": (b'{"prompt": "Hi", "parameters": {"sequence_id": "\xff"}}', "UTF-8"),
    "an input": (b'{"prompt": "\xff"}', "UTF-8"),
}


@pytest.mark.parametrize("path", ["generate", "generate_stream"])
@pytest.mark.parametrize("kind", NOT_UTF8)
def test_text_that_is_not_utf8_is_explained(kind: str, path: str, server: TritonServer) -> None:
    body, expected = NOT_UTF8[kind]
    request = urllib.request.Request(
        f"{server.http_address}/v2/models/nvlm/{path}", body, {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with pytest.raises(urllib.error.HTTPError) as raised:
        opener.open(request, timeout=60)
    assert raised.value.code == 400
    assert expected in raised.value.read().decode()
