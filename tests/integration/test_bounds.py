"""Strangers cannot make the server take memory, disk or descriptors without bound."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from live_server import ENDLESS, ask_raw, make_image, metric, wait_until
from tritonclient.grpc import service_pb2_grpc

from nvlm_trt.errors import RequestError, ServerError
from nvlm_trt.image.decoding import ImageLimits
from nvlm_trt.serving.client import Client
from nvlm_trt.serving.grpc_messages import infer_request
from nvlm_trt.serving.triton import command
from nvlm_trt.serving.triton.guard import SHARED_MEMORY
from nvlm_trt.serving.triton.repository import RepositoryOptions
from nvlm_trt.serving.triton.server import ServerOptions, TritonServer

SHORT = {"max_tokens": 2, "ignore_eos": True}
CONNECTIONS = 1100


@pytest.fixture
def usual_limit() -> Iterator[None]:
    """Lowers the soft limit of open files to the usual one, and raises it for the test once a server has started."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 2 * CONNECTIONS:
        pytest.skip(f"the hard limit of open files is {before[1]}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("usual_limit")
def test_idle_connections_neither_stop_the_server_nor_fill_its_log(
    engine: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with TritonServer(engine("nvlm-d-tiny")) as server, contextlib.ExitStack() as connections:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        (log,) = tmp_path.glob("nvlm-trt-*/tritonserver.log")
        before = log.stat().st_size
        port = int(server.http_address.rpartition(":")[2])
        for _ in range(CONNECTIONS):
            connections.enter_context(socket.create_connection(("127.0.0.1", port)))
        time.sleep(1)
        with Client(server.address) as client:
            assert client.generate("Hi", sampling=SHORT).token_ids
        assert metric(server, "nvlm_free_slots") > 0
        assert log.stat().st_size - before < 1 << 20


def test_a_start_with_too_few_descriptors_is_one_line(engine: Callable[[str], Path], tmp_path: Path) -> None:
    serve = [sys.executable, "-m", "nvlm_trt.cli", "serve", str(engine("nvlm-d-tiny"))]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", *serve],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: tritonserver may have 64 files and connections open, too few")
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def regions(server: TritonServer) -> int:
    """Returns the bytes of a server's shared memory."""
    process = server._process
    assert process is not None
    return sum(path.stat().st_size for path in SHARED_MEMORY.glob(f"{process.shm_prefix}*"))


def test_a_request_over_the_bound_is_refused_before_it_is_copied(engine: Callable[[str], Path]) -> None:
    limits = ImageLimits(max_bytes=1 << 20, max_images=2)
    options = ServerOptions(repository=RepositoryOptions(image_limits=limits))
    with TritonServer(engine("nvlm-d-tiny"), options) as server:
        before = regions(server)
        for model in ("nvlm", "nvlm_ensemble"):
            with pytest.raises(RequestError, match="the request is larger than the server takes"):
                ask_raw(server, infer_request("Hi", images=[bytes(32 << 20)] * 8, model=model))
        assert regions(server) - before < 8 << 20
        largest = make_image(1)
        largest += bytes(limits.max_bytes - len(largest))
        with Client(server.address) as client:
            assert client.generate("Hi", images=[largest, largest], sampling=SHORT).token_ids
        server.check()


def test_a_stream_that_nobody_reads_ends(engine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_CONNECTION_MS", 1000)
    with TritonServer(engine("nvlm-d-tiny"), ServerOptions(answer_seconds=2)) as server:
        channel = grpc.insecure_channel(server.address.removeprefix("grpc://"))
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answers = stub.ModelStreamInfer(infer_request("Go on", sampling=ENDLESS) for _ in range(16))
        next(answers)
        wait_until(lambda: metric(server, "nvlm_active_slots") == 8, "all slots are taken")
        wait_until(lambda: metric(server, "nvlm_open_requests") == 0, "the requests end with their connection")
        tokens = metric(server, "nvlm_generated_tokens_total")
        assert tokens < 16 * ENDLESS["max_tokens"]
        with pytest.raises(grpc.RpcError):
            list(answers)
        channel.close()
        with Client(server.address) as client:
            assert client.generate("Hi", sampling=SHORT).token_ids


def test_an_answer_that_takes_too_long_is_told_in_one_line(
    engine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_CONNECTION_MS", 500)
    with (
        TritonServer(engine("nvlm-d-tiny"), ServerOptions(answer_seconds=1)) as server,
        Client(server.address) as client,
    ):
        with pytest.raises(ServerError, match="the connection to .* ended") as raised:
            for _ in client.stream("Hi", sampling=ENDLESS):
                time.sleep(0.001)
        assert "\n" not in str(raised.value)
        assert client.generate("Hi", sampling=SHORT).token_ids
