"""Writes the command line of tritonserver."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from pathlib import Path

from nvlm_trt.serving.triton.repository import BACKEND_THREADS

# Through shared memory a client names memory that the server writes to; the others change the server's settings.
_CLOSED_PROTOCOLS = "shared-memory,model-repository,trace,logging"
_KEEPALIVE_MS = 10_000
_KEEPALIVE_TIMEOUT_MS = 5_000
# Tritonserver keeps the answers that a client does not fetch, and a model cannot see that. So a connection takes new
# requests for a while only (a gRPC client then opens another by itself), and ends when the last answer may take no
# longer, with all that is kept for it.
_CONNECTION_MS = 60_000
REQUEST_SIZE_OPTION = "http-max-input-size"
_BASE64_GROWTH = 4 / 3  # of images in an HTTP request


def triton_command(
    executable: Path,
    models: Path,
    backends: Path,
    host: str,
    ports: Sequence[int],
    shm_prefix: str,
    answer_seconds: float,
    exit_seconds: float,
    request_bytes: int,
) -> list[str]:
    """Returns program and arguments. `ports`: gRPC, HTTP, metrics; `answer_seconds`: how long an answer may
    take; `exit_seconds`: how long SIGTERM may take; `request_bytes`: the largest request."""
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
        "grpc-max-connection-age": _CONNECTION_MS,
        "grpc-max-connection-age-grace": math.ceil(answer_seconds * 1000),
        # else the server keeps the last eight requests of each kind, however large
        "grpc-infer-allocation-pool-size": 0,
        "exit-timeout-secs": math.ceil(exit_seconds),
    }
    if knows(executable, REQUEST_SIZE_OPTION):
        flags[REQUEST_SIZE_OPTION] = math.ceil(request_bytes * _BASE64_GROWTH)
    command = [str(executable), *(f"--{name}={value}" for name, value in flags.items())]
    command += [f"--backend-config=python,thread-pool-size={BACKEND_THREADS}"]
    command += [f"--backend-config=python,shm-region-prefix-name={shm_prefix}"]
    # the configurations are complete: otherwise Triton starts every python model twice, to ask it for its own
    command += ["--disable-auto-complete-config"]
    if not Path("/dev/nvidiactl").exists():
        command += ["--allow-gpu-metrics=false", "--pinned-memory-pool-byte-size=0"]
    return command


def knows(executable: Path, option: str) -> bool:
    """Whether this tritonserver has an option: `http-max-input-size`, the size of a request, came with 25.07."""
    return option.encode() in executable.read_bytes()
