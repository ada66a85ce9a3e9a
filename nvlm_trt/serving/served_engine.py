"""Finds out which engine a running server serves, for reports that must name the measured engine."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from nvlm_trt.engine import Engine
from nvlm_trt.errors import NvlmError, ServerError
from nvlm_trt.serving.client import Client

_LOOPBACK = ("grpc://127.", "grpc://localhost:", "grpc://[::1]:")


@dataclass(frozen=True)
class ServedEngine:
    """The engine of a server. `path` is on the server's machine; `engine` is None unless that is this machine."""

    triton: str  # version
    path: str
    engine: Engine | None


def find_served_engine(url: str) -> ServedEngine:
    """Asks the server at `url`. Raises ServerError if there is none or it serves no engine of this product."""
    with Client(url) as client:
        if not client.ready():
            raise no_server(url)
        triton, path = client.served_engine()
    if url.startswith(_LOOPBACK):
        with contextlib.suppress(NvlmError):
            return ServedEngine(triton, path, Engine.open(path))
    return ServedEngine(triton, path, None)


def no_server(url: str) -> ServerError:
    """The error for an address at which no server answers."""
    return ServerError(f"no server answers at {url}; start one with `nvlm-trt serve`, or check host and port")
