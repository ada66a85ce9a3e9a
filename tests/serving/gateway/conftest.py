"""A gateway over a tiny engine in this process, behind a real HTTP server, for each file of tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live_gateway import LiveGateway, open_gateway

from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.serving.gateway.gateway import GatewayOptions

CHECKPOINTS = Path(__file__).parents[3] / "checkpoints"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of the trained nvlm-h-tiny."""
    engine = tmp_path_factory.mktemp("trained") / "nvlm-h-tiny"
    build_engine(CHECKPOINTS / "nvlm-h-tiny", engine)
    return engine


@pytest.fixture(scope="module")
def reading(trained: Path) -> Iterator[LiveGateway]:
    """A gateway over a model that can read."""
    with open_gateway(trained, GatewayOptions()) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def live(engine: Callable[[str], Path]) -> Iterator[LiveGateway]:
    """A gateway over nvlm-h-tiny with random weights; its bodies have at most 8 MiB."""
    with open_gateway(engine("nvlm-h-tiny"), GatewayOptions(max_body_bytes=8 << 20)) as gateway:
        yield gateway
