"""Renders a compose file: all replicas on one machine, each with GPUs and ports of its own."""

from __future__ import annotations

from typing import Any

from nvlm_trt.deployment.deployment import (
    ENGINE_FOLDER,
    GRPC_PORT,
    HTTP_PORT,
    METRICS_PORT,
    READY_PATH,
    USER,
    Deployment,
)
from nvlm_trt.deployment.launch_script import container_command
from nvlm_trt.errors import EngineError

_PORT_STEP = 10  # between the ports of two replicas
_MIB = 1 << 20


def compose_file(deployment: Deployment) -> dict[str, Any]:
    """Render the compose file. Raises EngineError for an engine on several nodes, and for more GPUs than the machine
    has."""
    layout, options = deployment.layout, deployment.options
    if layout.nodes > 1:
        raise EngineError(
            f"compose runs on one machine, not on {layout.nodes} nodes; choose --target kubernetes or slurm"
        )
    gpus = layout.replicas * deployment.gpus_per_node
    if gpus > options.gpus_per_node:
        raise EngineError(
            f"{layout.replicas} replicas take {gpus} GPUs, the machine has {options.gpus_per_node}; choose fewer "
            "--replicas, more --gpus-per-node, or --target kubernetes"
        )
    names = [
        f"{deployment.name}-{number}" if layout.replicas > 1 else deployment.name for number in range(layout.replicas)
    ]
    return {"name": deployment.name, "services": {name: _service(deployment, i) for i, name in enumerate(names)}}


def _service(deployment: Deployment, number: int) -> dict[str, Any]:
    engine = deployment.engine
    check = (
        "import urllib.request as r; "
        f"r.build_opener(r.ProxyHandler({{}})).open('http://127.0.0.1:{HTTP_PORT}{READY_PATH}', timeout=5)"
    )
    source = str(engine.path).replace("$", "$$")  # compose puts variables in the place of $NAME
    service: dict[str, Any] = {
        "image": deployment.image,
        "build": {"context": "."},
        "command": container_command(deployment),
        "user": f"{USER}:{USER}",
        "environment": {"HOME": "/tmp"},
        # nobody outside the machine reaches the server without a proxy in front of it
        "ports": [f"127.0.0.1:{port + number * _PORT_STEP}:{port}" for port in (HTTP_PORT, GRPC_PORT, METRICS_PORT)],
        "volumes": [
            {"type": "bind", "source": source, "target": ENGINE_FOLDER, "read_only": True},
        ],
        "read_only": True,
        # "exec": kernels that are compiled when they are needed are loaded from there
        "tmpfs": ["/tmp:size=2g,mode=1777,exec"],
        "shm_size": f"{engine.shared_memory // _MIB}m",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "healthcheck": {
            "test": ["CMD", "python3", "-c", check],
            "interval": "10s",
            "timeout": "10s",
            "retries": 3,
            "start_period": f"{deployment.start_seconds}s",
        },
        "stop_grace_period": f"{deployment.stop_seconds}s",
        "restart": "unless-stopped",
    }
    if engine.ranks > 1:
        service["ulimits"] = {"memlock": -1}  # memory that network cards and NCCL pin
    gpus = deployment.gpus_per_node
    if gpus:
        ids = [str(number * gpus + gpu) for gpu in range(gpus)]
        device = {"driver": "nvidia", "device_ids": ids, "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    return service
