"""Writes the command line of tritonserver."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

from nvlm_trt.serving.triton.repository import BACKEND_THREADS

# Through shared memory a client names memory that the server writes to; the others change the server's settings.
_CLOSED_PROTOCOLS = "shared-memory,model-repository,trace,logging"
_KEEPALIVE_MS = 10_000
_KEEPALIVE_TIMEOUT_MS = 5_000
_EXIT_SECONDS = 5


def triton_command(
    executable: Path, models: Path, backends: Path, host: str, ports: Sequence[int], shm_prefix: str
) -> list[str]:
    """Returns program and arguments. `ports`: gRPC, HTTP, metrics."""
    grpc_port, http_port, metrics_port = ports
    # closes a protocol: requires a header that nobody knows
    closed = f"{_CLOSED_PROTOCOLS}:{secrets.token_hex(16)}={secrets.token_hex(16)}"
    flags = {
        "model-repository": models,
        "backend-directory": backends,
        "grpc-address": host,
        "grpc-port": grpc_port,
        "http-address": host,
        "http-port": http_port,
        "metrics-address": host,
        "metrics-port": metrics_port,
        "grpc-restricted-protocol": closed,
        "http-restricted-api": closed,
        # notices a client whose machine is gone: it closes no connection, as a client that died does
        "grpc-keepalive-time": _KEEPALIVE_MS,
        "grpc-keepalive-timeout": _KEEPALIVE_TIMEOUT_MS,
        "exit-timeout-secs": _EXIT_SECONDS,
    }
    command = [str(executable), *(f"--{name}={value}" for name, value in flags.items())]
    command += [f"--backend-config=python,thread-pool-size={BACKEND_THREADS}"]
    command += [f"--backend-config=python,shm-region-prefix-name={shm_prefix}"]
    # the configurations are complete: otherwise Triton starts every python model twice, to ask it for its own
    command += ["--disable-auto-complete-config"]
    if not Path("/dev/nvidiactl").exists():
        command += ["--allow-gpu-metrics=false", "--pinned-memory-pool-byte-size=0"]
    return command
