"""Deltas as the tensors of a response."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from nvlm_trt.runtime.generation import Delta
from nvlm_trt.serving.chat_tensors import encode_delta


class ResponseTensors:
    """Most responses have nothing to say in three of their five tensors, so those are made once: a string tensor takes
    20 us, a third of what a token costs here. For one thread."""

    def __init__(self) -> None:
        self._empty: dict[str, Any] = {}  # by name

    def of(self, delta: Delta) -> list[Any]:
        """The tensors of one response."""
        return [
            self._empty_tensor(name, array) if array.dtype == object and not array[0] else pb_utils.Tensor(name, array)
            for name, array in encode_delta(delta).items()
        ]

    def close(self) -> None:
        """Give the shared memory back while the server still lives."""
        self._empty.clear()

    def _empty_tensor(self, name: str, array: Any) -> Any:
        if name not in self._empty:
            self._empty[name] = pb_utils.Tensor(name, array)
        return self._empty[name]
