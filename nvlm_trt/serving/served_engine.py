"""What a running server serves: for those that measure it and must say of which engine their numbers are."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from nvlm_trt.engine import Engine
from nvlm_trt.errors import NvlmError, ServerError
from nvlm_trt.serving.client import Client

_LOOPBACK = ("grpc://127.", "grpc://localhost:", "grpc://[::1]:")


@dataclass(frozen=True)
class ServedEngine:
    """`path` is the server's; `engine` is None unless that is on this machine too."""

    triton: str  # version
    path: str
    engine: Engine | None


def find_served_engine(url: str) -> ServedEngine:
    """Raises ServerError if there is no server at `url` or it serves something else."""
    with Client(url) as client:
        if not client.ready():
            raise no_server(url)
        triton, path = client.served_engine()
    if url.startswith(_LOOPBACK):
        with contextlib.suppress(NvlmError):
            return ServedEngine(triton, path, Engine.open(path))
    return ServedEngine(triton, path, None)


def no_server(url: str) -> ServerError:
    return ServerError(f"no server answers at {url}; start one with `nvlm-trt serve`, or check host and port")
