"""Tests that a request frees its slot when its client leaves, in whatever way."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from live_server import ENDLESS, MAX_QUEUE, ServerByName, make_image, metric, wait_until, wait_until_idle

from nvlm_trt.api import Delta
from nvlm_trt.errors import QueueFullError
from nvlm_trt.serving.client import AsyncClient, Client
from nvlm_trt.serving.triton.server import TritonServer

SLOTS = 8


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
