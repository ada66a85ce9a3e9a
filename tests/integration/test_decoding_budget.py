"""Tests that files which take a decoder long end within their budget, and hold up nobody, on a real server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest
from live_server import ServerByName, ask_raw, make_image, metric, wait_until, wait_until_idle
from tritonclient.grpc import service_pb2_grpc

from lab import bombs
from nvlm_trt.errors import RequestError
from nvlm_trt.image.decoding import ImageLimits
from nvlm_trt.serving.client import AsyncClient, Client
from nvlm_trt.serving.grpc_messages import infer_request
from nvlm_trt.serving.triton.repository import RepositoryOptions
from nvlm_trt.serving.triton.server import ServerOptions, TritonServer

BUDGET = 0.5
WAIT = 100.0  # far more than the budget, far less than an hour
SHORT = {"max_tokens": 2, "ignore_eos": True}
ENDLESS = bombs.scans(count=20_000)


def processes(server: TritonServer) -> list[psutil.Process]:
    assert server._process is not None
    return psutil.Process(server._process._server.pid).children(recursive=True)


def start(path: Path, seconds: float) -> Iterator[TritonServer]:
    """Runs a server with this budget, and checks that no process is left when it has stopped."""
    limits = ImageLimits(max_decode_seconds=seconds)
    with TritonServer(path, ServerOptions(repository=RepositoryOptions(image_limits=limits))) as server:
        yield server
        running = processes(server)
        assert any(map(is_worker, running))
    wait_until(lambda: not any(process.is_running() for process in running), "all processes have ended")


@pytest.fixture(scope="module")
def impatient(engine: Callable[[str], Path]) -> Iterator[TritonServer]:
    yield from start(engine("nvlm-d-tiny"), BUDGET)


@pytest.mark.parametrize("image_format", bombs.BOMBS)
def test_a_bomb_is_refused_in_one_line(image_format: str, impatient: TritonServer) -> None:
    bomb = ENDLESS if image_format == "JPEG" else bombs.BOMBS[image_format](0)
    with Client(impatient.address) as client:
        started = time.monotonic()
        with pytest.raises(RequestError) as raised:
            client.generate("Compare", images=[make_image(1), bomb], sampling=SHORT)
        assert time.monotonic() - started < WAIT
        assert str(raised.value) == (
            "image 2: decoding took more than 0.5 s of CPU time; save it again as a plain PNG or JPEG, or raise "
            "--max-decode-seconds"
        )
        assert client.generate("What?", images=[make_image(2)], sampling=SHORT).token_ids
    impatient.check()


def test_a_bomb_is_refused_by_the_ensemble_too(impatient: TritonServer) -> None:
    with pytest.raises(RequestError, match="image: decoding took more than 0.5 s of CPU time"):
        ask_raw(impatient, infer_request("What?", images=[ENDLESS], model="nvlm_ensemble"))
    impatient.check()


@pytest.mark.parametrize("packed", [b"NVLM tiles\n", b"NVLM tiles\n" + bytes(8), b"NVLM tiles\n" + b"\xff" * 9000])
def test_faulty_packed_tiles_are_refused(packed: bytes, served: ServerByName) -> None:
    server = served("nvlm-d-tiny")
    with pytest.raises(RequestError, match="packed tiles that do not fit the engine"):
        ask_raw(server, infer_request("What?", images=[packed], model="nvlm_ensemble"))
    with Client(server.address) as client, pytest.raises(RequestError, match="not a readable"):
        client.generate("What?", images=[packed])
    server.check()


@pytest.fixture(scope="module")
def patient(engine: Callable[[str], Path]) -> Iterator[TritonServer]:
    yield from start(engine("nvlm-h-tiny"), 1000)


def test_others_are_answered_beside_20_bombs_and_cancelling_ends_them(patient: TritonServer) -> None:
    async def attack() -> None:
        async with AsyncClient(patient.address) as client:
            known = await client.generate("What?", images=[make_image(1)], sampling=SHORT)
            bomb_requests = [
                asyncio.ensure_future(client.generate("What?", images=[ENDLESS + bytes([seed])])) for seed in range(20)
            ]
            await asyncio.to_thread(wait_until, lambda: metric(patient, "nvlm_open_requests") == 20, "20 are open")
            again = await client.generate("What?", images=[make_image(1)], sampling=SHORT)
            assert again.token_ids == known.token_ids
            assert again.usage is not None
            assert again.usage.cached_images == 1
            assert (await client.generate("Hello", sampling=SHORT)).token_ids
            assert (await client.generate("What?", images=[make_image(2)], sampling=SHORT)).token_ids
            assert not any(request.done() for request in bomb_requests)
            assert decoding(patient)
            for request in bomb_requests:
                request.cancel()
            await asyncio.gather(*bomb_requests, return_exceptions=True)

    asyncio.run(asyncio.wait_for(attack(), WAIT))
    wait_until(lambda: not decoding(patient), "no image is decoded")
    wait_until_idle(patient)


def test_images_of_nvlm_do_not_wait_for_those_of_the_ensemble(patient: TritonServer) -> None:
    with (
        grpc.insecure_channel(patient.address.removeprefix("grpc://")) as channel,
        Client(patient.address) as client,
        ThreadPoolExecutor(6) as pool,
    ):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = infer_request("What?", images=[ENDLESS], model="nvlm_ensemble")
        calls = [stub.ModelStreamInfer(iter([request])) for _ in range(6)]
        waiting = [pool.submit(list, call) for call in calls]
        try:
            wait_until(lambda: bool(decoding(patient)), "a bomb is decoded")
            started = time.monotonic()
            assert client.generate("What?", images=[make_image(5)], sampling=SHORT).token_ids
            assert time.monotonic() - started < WAIT
            assert not any(call.done() for call in waiting)
        finally:
            for call in calls:
                call.cancel()


def test_image_encoder_takes_no_encoded_images(patient: TritonServer) -> None:
    request = infer_request(None, images=[make_image(1)], model="image_encoder")
    with pytest.raises(RequestError, match="image: encoded, but only nvlm calls this model; send it to nvlm or"):
        ask_raw(patient, request)


def decoding(server: TritonServer) -> list[psutil.Process]:
    """Lists the processes that decode: workers that wait are asleep."""
    return [process for process in processes(server) if is_worker(process, psutil.STATUS_RUNNING)]


def is_worker(process: psutil.Process, *states: str) -> bool:
    """Returns whether this is a decoding worker, or the server of some, in one of `states` if there are any."""
    try:
        named = any("decoding_worker" in word for word in process.cmdline())
        return named and (not states or process.status() in states)
    except psutil.Error:  # it has just ended
        return False
