"""Brings about faults of tritonserver itself: here `serve` promises no more than a clean end."""

from __future__ import annotations

import contextlib
import subprocess
import urllib.parse

import grpc
from tritonclient.grpc import service_pb2_grpc

from lab.reliability.kind import Kind, kind
from lab.reliability.place import Place, require_answers
from lab.reliability.served import Served
from lab.reliability.wire import Wire
from nvlm_trt.serving.grpc_messages import infer_request

KINDS: list[Kind] = []
ENDS = "the server answers afterwards, or serve ends with status 2 and one line and nothing is left"


def _answers_or_ended(served: Served) -> None:
    """Waits a moment for the end of a server that crashed; else asks it."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        served.process.wait(5)
    if served.process.poll() is None:
        require_answers(served)
    else:
        served.require_ended(2)
        served.require_nothing_left()


@kind(KINDS, "JSON nested 100,000 deep over HTTP", ENDS)
def _nested(place: Place) -> None:
    served = place.serve()
    wire = Wire(served.address, served.http_address)
    for body in (b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"):
        wire.send_http("/v2/models/nvlm/generate", body, 3, 30)
        wire.send_http("/v2/models/nvlm/infer", body, 3, 30)
    wire.close()
    _answers_or_ended(served)


@kind(KINDS, "streams with the header triton_grpc_error", ENDS)
def _header(place: Place) -> None:
    served = place.serve()
    with grpc.insecure_channel(urllib.parse.urlsplit(served.address).netloc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for _ in range(40):
            with contextlib.suppress(grpc.RpcError):
                metadata = (("triton_grpc_error", "true"),)
                list(stub.ModelStreamInfer(iter([infer_request("")]), metadata=metadata, timeout=10))
    _answers_or_ended(served)
