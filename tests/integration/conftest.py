"""Starts one real server per architecture and session."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live_server import MAX_QUEUE, ServerByName

from nvlm_trt.serving.triton.repository import RepositoryOptions
from nvlm_trt.serving.triton.server import ServerOptions, TritonServer


@pytest.fixture(scope="session")
def served(engine: Callable[[str], Path]) -> Iterator[ServerByName]:
    """`served("nvlm-h-tiny")` is a running server of that engine; MAX_QUEUE requests may wait for a slot."""
    servers: dict[str, TritonServer] = {}
    with contextlib.ExitStack() as running:

        def start(name: str) -> TritonServer:
            if name not in servers:
                options = ServerOptions(repository=RepositoryOptions(max_queue=MAX_QUEUE))
                servers[name] = running.enter_context(TritonServer(engine(name), options))
            return servers[name]

        yield start
