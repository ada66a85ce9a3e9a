"""A gateway over a tiny engine in this process, behind a real HTTP server, for each file of tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live_gateway import LiveGateway, open_gateway

from nvlm_trt.serving.gateway.gateway import GatewayOptions


@pytest.fixture(scope="module")
def live(engine: Callable[[str], Path]) -> Iterator[LiveGateway]:
    """A gateway over nvlm-h-tiny with random weights; its bodies have at most 8 MiB."""
    with open_gateway(engine("nvlm-h-tiny"), GatewayOptions(max_body_bytes=8 << 20)) as gateway:
        yield gateway
