"""One deployment of an engine: what every target renders from, and the numbers that they share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nvlm_trt.deployment.deployed_engine import DeployedEngine
from nvlm_trt.deployment.layout import Layout
from nvlm_trt.deployment.options import DeployOptions
from nvlm_trt.serving.triton.server import ServerOptions
from nvlm_trt.serving.triton.stopping import EXIT_SECONDS

HTTP_PORT, GRPC_PORT, METRICS_PORT = 8000, 8001, 8002
ENGINE_FOLDER = "/engine"  # in every container
USER = 1000  # who serves there
READY_PATH = "/v2/models/nvlm/ready"  # the model is ready, not only the server
LIVE_PATH = "/v2/health/live"
# bytes per second at which a start reads the whole engine to check its hashes: a network volume's, assumed
_READ_RATE = 200e6
# for the rest of a stop: the container's, and mpirun's
_EXIT_MARGIN = 10


@dataclass(frozen=True)
class Deployment:
    """An engine, its layout on nodes, and the options."""

    engine: DeployedEngine
    layout: Layout
    options: DeployOptions
    version: str  # of nvlm-trt

    @classmethod
    def of(cls, engine: DeployedEngine, options: DeployOptions, version: str) -> Deployment:
        """Lay out the engine. Raises EngineError if the nodes do not fit its ranks."""
        layout = Layout.of(engine, options.replicas, options.nodes, options.gpus_per_node)
        return cls(engine, layout, options, version)

    @property
    def name(self) -> str:
        return self.options.name or self.engine.name

    @property
    def image(self) -> str:
        return self.options.image or f"{self.name}-server:{self.version}"

    @property
    def gpus_per_node(self) -> int:
        return self.layout.ranks_per_node if self.engine.on_gpu else 0

    @property
    def drain_seconds(self) -> int:
        """Return the seconds that a server takes at most to finish its requests and to end."""
        return math.ceil(ServerOptions().drain_seconds + EXIT_SECONDS)

    @property
    def stop_seconds(self) -> int:
        """Return the seconds after which a server that was told to stop may be killed."""
        return self.drain_seconds + _EXIT_MARGIN

    @property
    def start_seconds(self) -> int:
        """Return the seconds that a start may take: reading the engine, then loading it."""
        return math.ceil(self.engine.nbytes / _READ_RATE + ServerOptions().startup_seconds)

    def serve_command(self) -> list[str]:
        """Return the command that serves the engine, in a network of its own."""
        ports = {"--http-port": HTTP_PORT, "--grpc-port": GRPC_PORT, "--metrics-port": METRICS_PORT}
        named = [word for name, port in ports.items() for word in (name, str(port))]
        return ["nvlm-trt", "serve", ENGINE_FOLDER, "--host", "0.0.0.0", *named]

    def rank_script(self, serve: str) -> str:
        """Return the shell script of every rank: rank 0 runs `serve`, others the backend's worker. A worker ignores
        SIGTERM, which launchers send to all ranks: rank 0 still needs it for the open requests, and ends it then."""
        worker = f"python3 -m {self.engine.needs.worker} {ENGINE_FOLDER}"
        is_first = '[ "${OMPI_COMM_WORLD_RANK:-$SLURM_PROCID}" = 0 ]'
        return f"if {is_first}; then {serve}; else trap '' TERM; exec {worker}; fi"
