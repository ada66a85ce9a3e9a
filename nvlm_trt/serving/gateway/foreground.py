"""Runs a gateway in the foreground until a signal stops it: over an engine in this process, or over a server."""

from __future__ import annotations

from pathlib import Path

from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError
from nvlm_trt.image.fork_server import FORK_SERVER
from nvlm_trt.runtime.pipeline import Pipeline, RuntimeOptions
from nvlm_trt.serving.gateway.gateway import GatewayOptions
from nvlm_trt.serving.gateway.pipeline_source import PipelineSource
from nvlm_trt.serving.gateway.server import GatewayServer
from nvlm_trt.serving.gateway.triton_source import TritonSource
from nvlm_trt.serving.stop_signals import StopSignals

_POLL_SECONDS = 0.2


def serve_url(url: str, options: GatewayOptions, no_auth: bool) -> None:
    """Stand in front of the server at `url`. Raises ServerError if it does not answer or serves no engine of ours."""
    with StopSignals() as signals, GatewayServer(options, no_auth) as server:
        server.start()
        if server.serve(lambda: TritonSource.connect(url), signals.stop):
            server.announce()
        while not signals.stop.wait(_POLL_SECONDS):
            server.check()
        server.stop(signals.hurry)


def serve_engine(engine_dir: Path, threads: int | None, options: GatewayOptions, no_auth: bool) -> None:
    """Run an engine in this process. Raises EngineError if it cannot be loaded or fails."""
    with StopSignals() as signals, GatewayServer(options, no_auth) as server:
        server.start()
        FORK_SERVER.start()  # while the engine is loaded
        engine = Engine.open(engine_dir)
        runtime = RuntimeOptions(image_limits=options.image_limits, prepare_constraints=True)
        pipeline = Pipeline.open(engine.path, threads, options=runtime)
        try:
            if server.serve(lambda: _source(engine, pipeline), signals.stop):
                server.announce()
            while not signals.stop.wait(_POLL_SECONDS):
                server.check()
                if not pipeline.healthy:
                    raise EngineError("the engine has failed; see the messages above, and start the gateway again")
            server.stop(signals.hurry)
        finally:
            server.close()
            pipeline.close(drain=False)


async def _source(engine: Engine, pipeline: Pipeline) -> PipelineSource:
    return PipelineSource(engine, pipeline)
