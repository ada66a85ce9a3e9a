"""Runs one rank of an engine that several GPUs share, other than rank 0, until rank 0 closes the engine:
`python -m nvlm_trt.backends.tensorrt_llm.worker ENGINE`.
"""

from __future__ import annotations

import sys

from nvlm_trt.backends.opening import backend_of
from nvlm_trt.backends.tensorrt_llm import DEVICE, NAME
from nvlm_trt.backends.tensorrt_llm.engine_files import check_engine_files
from nvlm_trt.backends.tensorrt_llm.executor import load_executor
from nvlm_trt.backends.tensorrt_llm.launch import Launch
from nvlm_trt.backends.tensorrt_llm.runtime import import_bindings
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError, NvlmError


def work(directory: str) -> None:
    """Load this rank's part of an engine and take part in its steps. Raises EngineError, also on rank 0."""
    engine = Engine.open(directory)
    if backend_of(engine).name != NAME:
        raise EngineError(f"engine {directory} is of the backend {engine.manifest.backend}; only {NAME} has workers")
    record = check_engine_files(engine)
    launch = Launch.of()
    launch.check(f"engine {directory}", record.tp, record.pp)
    if launch.rank == 0:
        raise EngineError(
            "rank 0 of this launch answers requests; start `nvlm-trt serve` on it, and workers on the others"
        )
    executor = load_executor(import_bindings(), engine, record, DEVICE)
    executor.shutdown()  # of this rank: returns when rank 0 has ended the executor


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m nvlm_trt.backends.tensorrt_llm.worker ENGINE", file=sys.stderr)
        return 2
    try:
        work(sys.argv[1])
    except NvlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
