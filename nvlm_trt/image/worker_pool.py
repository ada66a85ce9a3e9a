"""Keeps idle decoding workers for the next image."""

from __future__ import annotations

import threading

from nvlm_trt.closing import ClosedOnExit
from nvlm_trt.image.decoding_process import DecodingProcess


class WorkerPool(ClosedOnExit):
    """Holds the workers that are idle. Thread-safe."""

    def __init__(self) -> None:
        self._idle: list[DecodingProcess] = []
        self._closed = False
        self._lock = threading.Lock()

    def take(self) -> DecodingProcess:
        """Return an idle worker, or start one. Raises EngineError."""
        with self._lock:
            while self._idle:
                process = self._idle.pop()
                if process.is_idle:
                    return process
                process.close()
        return DecodingProcess()

    def put_back(self, process: DecodingProcess) -> None:
        """Keep a worker that has done its job, unless the pool is closed."""
        with self._lock:
            if not self._closed:
                self._idle.append(process)
                return
        process.close()

    def close(self) -> None:
        """End the idle workers; those at work end when they are put back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for process in idle:
            process.close()
