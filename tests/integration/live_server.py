"""Helpers of the tests of a running server: images, metrics, waiting."""

from __future__ import annotations

import io
import re
import time
import urllib.request
from collections.abc import Callable
from typing import Protocol

import grpc
import numpy as np
from PIL import Image
from tritonclient.grpc import service_pb2, service_pb2_grpc

from nvlm_trt.api import Delta
from nvlm_trt.serving.grpc_messages import delta_of
from nvlm_trt.serving.triton.server import TritonServer

ServerByName = Callable[[str], TritonServer]
MAX_QUEUE = 12
REPORT_SECONDS = 0.3  # more than a server takes to report
ENDLESS = {"max_tokens": 3000, "ignore_eos": True}


def make_image(seed: int, width: int = 120, height: int = 80) -> bytes:
    """A PNG of random colour blocks, another for every seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(blocks).resize((width, height)).save(encoded, "PNG")
    return encoded.getvalue()


class HasMetrics(Protocol):
    @property
    def metrics_address(self) -> str: ...


def metric(server: HasMetrics, name: str) -> float:
    """Reads a metric, summed over its labels unless `name` has them all."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(server.metrics_address) as response:
        text = response.read().decode()
    values = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    assert values, f"{name} is not among the metrics"
    return sum(map(float, values))


def is_ready_over_http(address: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address + "/v2/health/ready", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def ask_raw(server: TritonServer, request: service_pb2.ModelInferRequest) -> list[Delta]:
    """Sends a message unchanged. Raises the exception that an error response stands for."""
    with grpc.insecure_channel(server.address.removeprefix("grpc://")) as channel:
        responses = list(service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([request])))
    return [delta for delta in map(delta_of, responses) if delta is not None]


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)


def wait_until_idle(server: TritonServer) -> None:
    """Waits until the metrics count all requests that have ended, the two requests of the server's start included."""
    time.sleep(REPORT_SECONDS)  # the page may still show the time before the last request
    wait_until(lambda: metric(server, "nvlm_finished_requests_total") >= 2, "the first requests are counted")
    wait_until(lambda: metric(server, "nvlm_open_requests") == 0, "no open requests")
    wait_until(lambda: metric(server, "nvlm_active_slots") == 0, "no active slots")
