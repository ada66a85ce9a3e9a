"""Tests that a request frees its slot when its client leaves, in whatever way."""

from __future__ import annotations

import asyncio
import contextlib
import io
import random
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from live_server import ENDLESS, MAX_QUEUE, ServerByName, make_image, metric, wait_until, wait_until_idle
from PIL import Image
from tritonclient.grpc import service_pb2, service_pb2_grpc

from nvlm_trt.api import Delta
from nvlm_trt.errors import QueueFullError
from nvlm_trt.serving.chat_tensors import CANCEL, CANCEL_TOKEN
from nvlm_trt.serving.client import AsyncClient, Client
from nvlm_trt.serving.grpc_messages import cancelling_request, infer_request
from nvlm_trt.serving.triton.server import TritonServer

SLOTS = 8
CANCELLED = 'nvlm_finished_requests_total{reason="cancelled"}'


@pytest.fixture
def server(served: ServerByName) -> Iterator[TritonServer]:
    server = served("nvlm-h-tiny")
    wait_until_idle(server)
    yield server
    wait_until_idle(server)


def occupy(client: Client, count: int) -> list[Iterator[Delta]]:
    """Endless streams, each of which has received its first token."""
    streams = [client.stream(f"Tell me {i}", images=[make_image(i)], sampling=ENDLESS) for i in range(count)]
    for stream in streams:
        assert next(stream).token_ids
    return streams


def test_a_cancelled_stream_frees_its_slot_within_one_step(server: TritonServer) -> None:
    late_before = metric(server, "nvlm_late_tokens_total")
    finished_before = metric(server, "nvlm_finished_requests_total")
    with Client(server.address) as client:
        streams = occupy(client, SLOTS)
        wait_until(lambda: metric(server, "nvlm_free_slots") == 0, "all slots are taken")
        waiting = client.stream("And me?", sampling={"max_tokens": 3, "ignore_eos": True})
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(list, waiting)
            wait_until(lambda: metric(server, "nvlm_queued_requests") == 1, "one request waits")
            streams.pop().close()
            assert [t for delta in answer.result(timeout=20) for t in delta.token_ids]  # it has got the slot
        wait_until(lambda: metric(server, "nvlm_active_slots") == SLOTS - 1, "the slot is free")
        assert all(next(stream).token_ids for stream in streams)  # the others go on
        for stream in streams:
            stream.close()
    wait_until_idle(server)
    assert metric(server, "nvlm_finished_requests_total") - finished_before == SLOTS + 1
    # the step that runs when a cancellation is noticed adds one token at most
    assert metric(server, "nvlm_late_tokens_total") - late_before <= SLOTS


def test_a_cancelled_stream_of_several_answers_frees_all_their_slots(server: TritonServer) -> None:
    with Client(server.address) as client:
        stream = client.stream("Tell me", images=[make_image(1)], sampling={**ENDLESS, "n": 5, "temperature": 1})
        seen = {next(stream).index for _ in range(20)}
        wait_until(lambda: metric(server, "nvlm_active_slots") == 5, "five answers")
        waiting = client.stream("And us?", sampling={"max_tokens": 3, "ignore_eos": True, "n": 4})
        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(list, waiting)
            wait_until(lambda: metric(server, "nvlm_queued_requests") == 1, "four answers wait for four slots")
            stream.close()
            deltas = answers.result(timeout=20)
    assert seen == set(range(5))
    assert sorted(delta.index for delta in deltas if delta.finish_reason) == [0, 1, 2, 3]


def test_requests_without_a_slot_can_be_cancelled(server: TritonServer) -> None:
    """Also while their images are being encoded."""

    async def queue_and_cancel() -> None:
        async with AsyncClient(server.address) as client:
            asked = [
                asyncio.ensure_future(client.generate("Go on", images=[make_image(300 + i)], sampling=ENDLESS))
                for i in range(MAX_QUEUE)
            ]
            everything = SLOTS - 1 + MAX_QUEUE
            await asyncio.to_thread(
                wait_until, lambda: metric(server, "nvlm_open_requests") == everything, "all are accepted"
            )
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    with Client(server.address) as client:
        streams = occupy(client, SLOTS - 1)
        asyncio.run(queue_and_cancel())
        wait_until(lambda: metric(server, "nvlm_open_requests") == SLOTS - 1, "only those with a slot are left")
        assert metric(server, "nvlm_queued_requests") == 0
        for stream in streams:
            stream.close()


def test_a_full_queue_is_a_clear_error(server: TritonServer) -> None:
    async def overload() -> list[object]:
        async with AsyncClient(server.address) as client:
            streams = [client.stream("Go on", sampling=ENDLESS) for _ in range(SLOTS)]
            for stream in streams:
                await anext(stream)
            rest = [asyncio.ensure_future(client.generate("Go on", sampling=ENDLESS)) for _ in range(MAX_QUEUE + 2)]
            done, waiting = await asyncio.wait(rest, return_when=asyncio.FIRST_COMPLETED, timeout=20)
            while len(done) < 2:
                more, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=20)
                done |= more
            for task in waiting:
                task.cancel()
            for stream in streams:
                await stream.aclose()
            return [task.exception() for task in done]

    errors = asyncio.run(overload())
    assert len(errors) == 2
    for error in errors:
        assert isinstance(error, QueueFullError)
        assert f"the queue holds {MAX_QUEUE}" in str(error)
        assert "\n" not in str(error)


def test_a_client_that_is_killed_frees_its_slot(server: TritonServer) -> None:
    script = (
        "import sys\n"
        "from nvlm_trt.serving.client import Client\n"
        "for delta in Client(sys.argv[1]).stream('Go on', sampling={'max_tokens': 3000, 'ignore_eos': True}):\n"
        "    print(delta.token_ids, flush=True)\n"
    )
    tokens_before = metric(server, "nvlm_generated_tokens_total")
    client = subprocess.Popen([sys.executable, "-c", script, server.address], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    assert client.stdout.readline()  # it has a slot
    client.kill()
    client.wait()
    wait_until_idle(server)
    assert metric(server, "nvlm_generated_tokens_total") - tokens_before < 3000


# --- by a token ------------------------------------------------------------------------------------------------------


class Wire:
    """Sends messages as they are, each on a stream of its own."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

    def send(self, request: service_pb2.ModelInferRequest) -> Iterator[service_pb2.ModelStreamInferResponse]:
        responses: Iterator[service_pb2.ModelStreamInferResponse] = self._stub.ModelStreamInfer(iter([request]))
        return responses


@pytest.fixture
def wire(server: TritonServer) -> Iterator[Wire]:
    with grpc.insecure_channel(server.address.removeprefix("grpc://")) as channel:
        yield Wire(channel)


def endless(token: str, **fields: Any) -> service_pb2.ModelInferRequest:
    request = infer_request("Go on", sampling=ENDLESS, **fields)
    request.parameters[CANCEL_TOKEN].string_param = token
    return request


def slow_image() -> bytes:
    """A PNG that takes most of a second to decode."""
    encoded = io.BytesIO()
    Image.new("RGB", (7900, 7900)).save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()


def test_a_token_cancels_its_own_request_alone(server: TritonServer, wire: Wire) -> None:
    mine, others = secrets.token_hex(16), secrets.token_hex(16)
    cancelled = metric(server, CANCELLED)
    asked, asked_by_others = wire.send(endless(mine)), wire.send(endless(others))
    next(asked)
    next(asked_by_others)
    unknown = list(wire.send(cancelling_request(secrets.token_hex(16))))
    assert all(next(responses).infer_response.outputs for responses in (asked, asked_by_others))
    known = list(wire.send(cancelling_request(mine)))
    list(asked)  # ends
    assert next(asked_by_others).infer_response.outputs
    ended = list(wire.send(cancelling_request(mine)))  # nothing has this token any more
    assert unknown == known == ended  # nobody learns which tokens there are
    list(wire.send(cancelling_request(others)))
    list(asked_by_others)
    wait_until_idle(server)
    assert metric(server, CANCELLED) - cancelled == 2


@pytest.mark.parametrize("name", [CANCEL, CANCEL_TOKEN])
def test_a_token_that_could_be_guessed_is_refused(name: str, server: TritonServer, wire: Wire) -> None:
    request = service_pb2.ModelInferRequest(model_name="nvlm") if name == CANCEL else infer_request("Hi")
    request.parameters[name].string_param = "1234"
    (response,) = wire.send(request)
    assert f"request parameter '{name}' is '1234', no token of 32" in response.error_message
    assert "\n" not in response.error_message


def test_a_token_cancels_requests_that_wait(server: TritonServer, wire: Wire) -> None:
    """For a slot, for their images, or to be counted."""
    token, slow = secrets.token_hex(16), slow_image()
    with Client(server.address) as client:
        streams = occupy(client, SLOTS)
        asked = [
            wire.send(endless(token)),
            wire.send(endless(token, images=[make_image(700)])),
            wire.send(endless(token, images=[slow])),
            wire.send(endless(token, images=[slow], count_only=True)),
        ]
        wait_until(lambda: metric(server, "nvlm_open_requests") == SLOTS + 3, "they wait")
        list(wire.send(cancelling_request(token)))
        assert [list(responses) for responses in asked] == [[]] * 4  # they end without a response
        wait_until(lambda: metric(server, "nvlm_open_requests") == SLOTS, "those with a slot go on")
        for stream in streams:
            stream.close()


def test_200_answers_closed_early_leave_nothing(server: TritonServer) -> None:
    sampling = {"max_tokens": 12, "ignore_eos": True}
    finished = metric(server, "nvlm_finished_requests_total")
    with Client(server.address) as client:
        expected = client.generate("Tell me", images=[make_image(5)], sampling=sampling).token_ids
        threads = threading.active_count()
        opened = []

        def ask_and_leave(number: int) -> None:
            images = [make_image(800 + number)] if number % 5 == 0 else []
            stream = client.stream(f"Go on {number}", images=images, sampling=ENDLESS)
            with contextlib.suppress(QueueFullError):
                for _ in range(number % 4 + 1):
                    next(stream)
                opened.append(number)
            stream.close()  # type: ignore[attr-defined]

        with ThreadPoolExecutor(SLOTS) as pool:
            list(pool.map(ask_and_leave, range(100)))

        async def ask_and_leave_async() -> None:
            async with AsyncClient(server.address) as client:
                limit = asyncio.Semaphore(SLOTS)

                async def leave(number: int) -> None:
                    async with limit:
                        asking = asyncio.ensure_future(client.generate(f"Go on {number}", sampling=ENDLESS))
                        await asyncio.sleep(random.Random(number).random() / 50)
                        asking.cancel()
                        await asyncio.gather(asking, return_exceptions=True)

                await asyncio.gather(*map(leave, range(100)))

        asyncio.run(ask_and_leave_async())
        wait_until_idle(server)
        assert client.generate("Tell me", images=[make_image(5)], sampling=sampling).token_ids == expected
        wait_until(lambda: threading.active_count() <= threads, "no thread is left")
    wait_until_idle(server)
    assert metric(server, "nvlm_free_slots") == SLOTS
    assert len(opened) > 50
    assert metric(server, "nvlm_finished_requests_total") - finished >= len(opened) + 2
