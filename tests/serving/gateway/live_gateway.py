"""Opens a gateway over an engine in this process, on a free port."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gateway_calls import Endpoint, wait_until

from nvlm_trt.engine import Engine
from nvlm_trt.runtime.pipeline import Pipeline, RuntimeOptions
from nvlm_trt.serving.gateway.gateway import GatewayOptions
from nvlm_trt.serving.gateway.pipeline_source import PipelineSource
from nvlm_trt.serving.gateway.server import GatewayServer

MAX_QUEUE = 6


@dataclass
class LiveGateway(Endpoint):
    server: GatewayServer
    pipeline: Pipeline

    @property
    def active(self) -> int:
        return self.pipeline.metrics().generator.active

    @property
    def queued(self) -> int:
        return self.pipeline.metrics().generator.queued

    def wait_until_idle(self) -> None:
        wait_until(lambda: self.active + self.queued == 0, "no request is active")


@contextlib.contextmanager
def open_gateway(engine_dir: Path, options: GatewayOptions, no_auth: bool = False) -> Iterator[LiveGateway]:
    engine = Engine.open(engine_dir)
    runtime = RuntimeOptions(max_queue=MAX_QUEUE, image_limits=options.image_limits)
    with Pipeline.open(engine.path, options=runtime) as pipeline, GatewayServer(options, no_auth) as server:
        server.start()

        async def source() -> PipelineSource:
            return PipelineSource(engine, pipeline)

        assert server.serve(source)
        port = int(server.address.rpartition(":")[2])
        yield LiveGateway(port, engine.config.name, server, pipeline)
