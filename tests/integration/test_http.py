"""Images over HTTP: what `generate` and `generate_stream` answer, and that the commands of docs/triton.md do."""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import shutil
import subprocess
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from live_server import ENDLESS, ServerByName, make_image, metric, wait_until, wait_until_idle
from tritonclient.utils import InferenceServerException

from nvlm_trt.errors import RequestError
from nvlm_trt.serving.client import Client
from nvlm_trt.serving.triton.server import TritonServer

ROOT = Path(__file__).parents[2]
SAMPLING = {"max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(served: ServerByName) -> TritonServer:
    return served("nvlm-h-tiny")


def post(server: TritonServer, endpoint: str, model: str = "nvlm", **inputs: object) -> tuple[int, str]:
    """Returns the status and the body of an answer."""
    if isinstance(inputs.get("sampling_parameters"), dict):
        inputs["sampling_parameters"] = json.dumps(inputs["sampling_parameters"])
    request = urllib.request.Request(f"{server.http_address}/v2/models/{model}/{endpoint}", json.dumps(inputs).encode())
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def events(body: str) -> list[dict[str, Any]]:
    """Reads the events of a stream."""
    lines = [line for line in body.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def as_list(token_ids: int | list[int]) -> list[int]:
    return [token_ids] if isinstance(token_ids, int) else token_ids


def text(image: bytes, uri: str = "") -> str:
    return uri + base64.b64encode(image).decode()


def test_answers_are_those_of_grpc(server: TritonServer) -> None:
    images = [make_image(401), make_image(402, 200, 60)]
    prompt = "Compare <image> with <image>."
    with Client(server.address) as client:
        expected = client.generate(prompt, images=images, sampling=SAMPLING, max_tiles=2)
        # base64 text is the same image for gRPC's clients, and for the image cache
        texts = [text(image).encode() for image in images]
        again = client.generate(prompt, images=texts, sampling=SAMPLING, max_tiles=2)
        assert again.token_ids == expected.token_ids
        assert again.usage is not None
        assert again.usage.cached_images == 2
    sent = [text(images[0]), text(images[1], "data:image/png;base64,")]
    chat = {"prompt": prompt, "image": sent, "sampling_parameters": SAMPLING, "max_tiles": 2}
    status, body = post(server, "generate", stream=False, **chat)
    answer = json.loads(body)
    assert (status, answer["token_ids"], answer["text"]) == (200, expected.token_ids, expected.text)
    assert answer["finish_reason"] == "length"
    assert json.loads(answer["usage"])["image_tiles"] == 6
    several = {**SAMPLING, "n": 2, "temperature": 1, "seed": 3}
    status, body = post(server, "generate", stream=False, **{**chat, "sampling_parameters": several})
    assert status == 400
    assert "n = 2 is not allowed with `stream` false" in body
    status, body = post(server, "generate_stream", **{**chat, "sampling_parameters": several})
    with Client(server.address) as client:
        expected_all = client.generate_all(prompt, images=images, sampling=several, max_tiles=2)
    token_ids: list[list[int]] = [[], []]
    for event in events(body):
        token_ids[event["index"]] += as_list(event["token_ids"])
    assert (status, token_ids) == (200, [one.token_ids for one in expected_all])
    for stream in ({}, {"stream": True}):
        status, body = post(server, "generate_stream", **stream, **chat)
        streamed = events(body)
        assert status == 200
        assert len(streamed) > 1
        assert [t for event in streamed for t in as_list(event["token_ids"])] == expected.token_ids
        assert "".join(event["text"] for event in streamed) == expected.text
        assert [bool(event["usage"]) for event in streamed] == [False] * (len(streamed) - 1) + [True]


def test_image_parts_and_a_single_image(server: TritonServer) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    chat = {"messages": json.dumps([{"role": "user", "content": content}]), "image": text(make_image(403))}
    status, body = post(server, "generate", stream=False, sampling_parameters={"max_tokens": 1}, **chat)
    assert (status, type(json.loads(body)["token_ids"])) == (200, int)


def test_the_ensemble_takes_base64_too(server: TritonServer) -> None:
    chat = {"prompt": "What?", "image": text(make_image(404)), "sampling_parameters": SAMPLING}
    of_ensemble, of_model = (
        [t for event in events(post(server, "generate_stream", model, **chat)[1]) for t in as_list(event["token_ids"])]
        for model in ("nvlm_ensemble", "nvlm")
    )
    assert len(of_model) == 12
    assert of_ensemble == of_model


@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
@pytest.mark.parametrize("model", ["nvlm", "nvlm_ensemble"])
def test_wrong_base64_is_told_in_one_line(endpoint: str, model: str, server: TritonServer) -> None:
    good = text(make_image(1))
    wrong = {
        "wrong base64": good[:100] + "\n" + good[100:],
        "wrong base64 ": good[:-1],
        "not a readable": "aGVsbG8=",
        "the data URI does not begin": "data:image/png," + good,
        "a text that is not": "https://example.com/" + "a" * 60,
        "truncated or corrupt": text(make_image(1)[:300]),
        "34603008 bytes encoded, at most 33554432": text(make_image(1).ljust(33 << 20)),
    }
    for expected, image in wrong.items():
        status, body = post(server, endpoint, model, prompt="Hi", image=[good, image])
        assert status == 400
        error = events(body)[0]["error"] if endpoint == "generate_stream" else json.loads(body)["error"]
        assert f"image 2: {expected.strip()}" in error
        assert "\n" not in error
    server.check()


def test_errors_keep_their_status(server: TritonServer) -> None:
    assert post(server, "generate", prompt="") == (
        400,
        '{"error":"invalid request: the prompt is empty; send a question or an image"}',
    )
    status, body = post(server, "generate", prompt="Hi", stream="no")
    assert (status, "as boolean" in body) == (500, True)


def test_plain_requests_do_not_work_on_a_decoupled_model(server: TritonServer) -> None:
    page = (ROOT / "docs" / "triton.md").read_text().replace("\n", " ")
    inputs = [{"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["Hi"]}]
    for model in ("nvlm", "nvlm_ensemble"):
        status, body = post(server, "infer", model, inputs=inputs)
        error = json.loads(body)["error"]
        assert (status, error) == (501, "HTTP end point doesn't support models with decoupled transaction policy")
        assert f"`{error}`" in page
        tensor = tritonclient.grpc.InferInput("prompt", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([b"Hi"], np.object_))
        client = tritonclient.grpc.InferenceServerClient(server.address.removeprefix("grpc://"))
        with pytest.raises(InferenceServerException) as raised:
            client.infer(model, [tensor])
        assert raised.value.status() == "StatusCode.UNIMPLEMENTED"
        assert f"`{raised.value.message()}`" in page
    long = {**SAMPLING, "max_tokens": 200}  # a busy machine may send a short answer as one response
    status, body = post(server, "generate", prompt="Hi", sampling_parameters=long)
    assert (status, json.loads(body)["error"][:53]) == (200, "generate expects model to produce exactly 1 response,")
    wait_until_idle(server)


def test_a_client_that_leaves_a_stream_frees_its_slot(server: TritonServer) -> None:
    wait_until_idle(server)
    cancelled = metric(server, 'nvlm_finished_requests_total{reason="cancelled"}')
    body = json.dumps({"prompt": "Go on", "sampling_parameters": json.dumps(ENDLESS)}).encode()
    request = urllib.request.Request(f"{server.http_address}/v2/models/nvlm/generate_stream", body)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as response:
        assert response.readline().startswith(b"data: ")
    wait_until(
        lambda: metric(server, 'nvlm_finished_requests_total{reason="cancelled"}') > cancelled, "it is cancelled"
    )
    wait_until_idle(server)


def test_another_request_ends_an_answer_that_comes_in_one_response(server: TritonServer) -> None:
    """tritonserver does not notice that the client of such an answer is gone."""
    wait_until_idle(server)
    token = secrets.token_hex(16)
    cancelled = metric(server, 'nvlm_finished_requests_total{reason="cancelled"}')
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(
            post, server, "generate", prompt="Go on", stream=False, cancel_token=token, sampling_parameters=ENDLESS
        )
        wait_until(lambda: metric(server, "nvlm_active_slots") == 1, "it is being answered")
        status, body = post(server, "generate", cancel=token)
        assert (status, sorted(json.loads(body))) == (200, ["model_name", "model_version"])
        assert "error" in json.loads(asked.result(timeout=60)[1])  # there is no response to it
    wait_until_idle(server)
    assert metric(server, 'nvlm_finished_requests_total{reason="cancelled"}') == cancelled + 1


def test_the_commands_of_the_page(server: TritonServer) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    page = (ROOT / "docs" / "triton.md").read_text()
    commands = re.findall(r"^```bash\n(curl .*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(commands) == 2
    environment = {**os.environ, "no_proxy": "*"}
    bodies = [
        subprocess.run(
            ["bash", "-c", command.replace("http://localhost:8000", server.http_address)],
            cwd=ROOT,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for command in commands
    ]
    answer = json.loads(bodies[0])
    assert answer["finish_reason"]
    assert json.loads(answer["usage"])["image_tiles"] > 1
    streamed = events(bodies[1])
    assert len(streamed) > 1
    assert json.loads(streamed[-1]["usage"])["image_tiles"] == 2
    example = re.search(r"^data: .*", page, re.MULTILINE)
    assert example is not None
    assert list(events(example[0])[0]) == list(streamed[0])


def test_grpc_clients_are_told_of_wrong_base64(server: TritonServer) -> None:
    with Client(server.address) as client, pytest.raises(RequestError, match=r"^image: wrong base64 \("):
        client.generate("What?", images=[text(make_image(1)).encode()[:-2]])
