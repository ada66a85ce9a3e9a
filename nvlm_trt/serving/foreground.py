"""Runs a server in the foreground, until a signal stops it."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

from nvlm_trt.errors import NvlmError
from nvlm_trt.serving.stop_signals import StopSignals
from nvlm_trt.serving.triton.server import ServerOptions, TritonServer
from nvlm_trt.standard_streams import OutputError

if TYPE_CHECKING:
    from nvlm_trt.serving.gateway.server import GatewayServer

_POLL_SECONDS = 0.2


def run_in_foreground(
    engine: str | os.PathLike[str], options: ServerOptions | None = None, gateway: GatewayServer | None = None
) -> int:
    """Serves until SIGINT, SIGTERM or SIGHUP, finishes the open requests and returns 0.

    With a `gateway`, which listens already, serves OpenAI's endpoints too. Raises what `TritonServer.start` raises, and
    ServerError if the server, one of its models or the gateway dies.
    """
    server = TritonServer(engine, options)
    with StopSignals() as signals:
        try:
            if server.start(give_up=signals.stop):
                _open(gateway, server, signals)
                with contextlib.suppress(OutputError):  # nobody reads the line: no reason to end a server
                    print(
                        f"serving at {server.address} (HTTP {server.http_address}, {server.metrics_address})",
                        flush=True,
                    )
            while not signals.stop.wait(_POLL_SECONDS):
                server.check()
                if gateway is not None:
                    gateway.check()
            if gateway is not None:
                gateway.drain()
            server.stop(hurry=signals.hurry)  # the open requests of the gateway are the server's
            if gateway is not None:
                gateway.stop(signals.hurry)
        except NvlmError:
            for line in server.log_tail:
                print(line, file=sys.stderr)
            raise
        finally:
            server.kill()
            if gateway is not None:
                gateway.close()
    return 0


def _open(gateway: GatewayServer | None, server: TritonServer, signals: StopSignals) -> None:
    if gateway is None:
        return
    from nvlm_trt.serving.gateway.triton_source import TritonSource

    if gateway.serve(lambda: TritonSource.connect(server.address), signals.stop):
        gateway.announce()
