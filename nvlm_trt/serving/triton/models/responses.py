"""Makes Triton's responses of deltas and errors."""

from __future__ import annotations

import traceback
from typing import Any

from nvlm_trt.api import Delta
from nvlm_trt.errors import ImageError, NvlmError, QueueFullError, RequestError, ServerError
from nvlm_trt.serving.chat_tensors import encode_delta, encode_error


class Responses:
    """Makes responses. Only `of_error` is thread-safe.

    Caches the empty string tensors: making one takes 20 us. Most responses need three of them, a third of what a token
    costs here."""

    def __init__(self, pb_utils: Any) -> None:
        self._pb_utils = pb_utils
        self._empty: dict[str, Any] = {}  # by name

    def of_delta(self, delta: Delta) -> Any:
        tensors = [
            self._empty_tensor(name, array) if array.dtype == object and not array[0] else self._tensor(name, array)
            for name, array in encode_delta(delta).items()
        ]
        return self._pb_utils.InferenceResponse(tensors)

    def of_error(self, error: Exception) -> Any:
        """Make a response without outputs, whose message is one line for the client.

        Logs the traceback of an error that is not an NvlmError: such an error is a defect."""
        if isinstance(error, NvlmError):
            message = encode_error(error)
        else:
            self._pb_utils.Logger.log_error("".join(traceback.format_exception(error)))
            message = f"internal error ({type(error).__name__}); the server's log has the details"
        return self._pb_utils.InferenceResponse(error=self._pb_utils.TritonError(message, self._code(error)))

    def close(self) -> None:
        """Free the shared memory of the cached tensors while the server still runs."""
        self._empty.clear()

    def _tensor(self, name: str, array: Any) -> Any:
        return self._pb_utils.Tensor(name, array)

    def _empty_tensor(self, name: str, array: Any) -> Any:
        if name not in self._empty:
            self._empty[name] = self._tensor(name, array)
        return self._empty[name]

    def _code(self, error: Exception) -> Any:
        codes = self._pb_utils.TritonError
        if isinstance(error, (RequestError, ImageError)):
            return codes.INVALID_ARG
        if isinstance(error, (QueueFullError, ServerError)):
            return codes.UNAVAILABLE
        return codes.INTERNAL
