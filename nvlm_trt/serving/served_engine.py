"""Finds out which engine a running server serves, for reports that must name the measured engine."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from nvlm_trt.engine import Engine
from nvlm_trt.errors import NvlmError, ServerError
from nvlm_trt.serving.client import Client
from nvlm_trt.serving.served_record import ServedRecord

_LOOPBACK = ("grpc://127.", "grpc://localhost:", "grpc://[::1]:")


@dataclass(frozen=True)
class ServedEngine:
    """The engine that a server has loaded. `path` is on the server's machine.

    `engine` is None unless the directory is on this machine and holds the engine that is served; `replaced`: it is on
    this machine and holds another engine by now. An earlier nvlm-trt gives no record: then an engine in the directory
    counts as the one that is served, and `record` is None without such a directory."""

    triton: str  # version
    path: str
    record: ServedRecord | None
    engine: Engine | None
    replaced: bool = False


def find_served_engine(url: str) -> ServedEngine:
    """Asks the server at `url`. Raises ServerError if there is none or it serves no engine of this product."""
    with Client(url) as client:
        if not client.ready():
            raise no_server(url)
        triton, path, record = client.served_engine()
    engine, here = None, url.startswith(_LOOPBACK)
    if here or record is not None:  # a fingerprint also tells whether a server by another name is of this machine
        with contextlib.suppress(NvlmError):
            engine = Engine.open(path)
    if record is None:
        return ServedEngine(triton, path, ServedRecord.of(engine) if engine else None, engine)
    if engine is None or engine.fingerprint == record.fingerprint:
        return ServedEngine(triton, path, record, engine)
    return ServedEngine(triton, path, record, None, replaced=here)


def no_server(url: str) -> ServerError:
    """The error for an address at which no server answers."""
    return ServerError(f"no server answers at {url}; start one with `nvlm-trt serve`, or check host and port")
