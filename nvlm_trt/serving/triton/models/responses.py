"""Makes Triton's responses of deltas and errors."""

from __future__ import annotations

import traceback
from typing import Any

from nvlm_trt.api import Delta, PromptCount
from nvlm_trt.errors import ImageError, NvlmError, QueueFullError, RequestError, ServerError
from nvlm_trt.serving.chat_tensors import encode_count, encode_delta, encode_error


class Responses:
    """Makes responses. Only `of_count`, `of_cancellation` and `of_error` are thread-safe.

    Caches the tensors of empty strings and of indices: making one takes 20 us. Most responses need four of them, a
    third of what a token costs here."""

    def __init__(self, pb_utils: Any) -> None:
        self._pb_utils = pb_utils
        self._cached: dict[tuple[str, int], Any] = {}  # by name and number, 0 for an empty string

    def of_delta(self, delta: Delta) -> Any:
        tensors = [self._output(name, array) for name, array in encode_delta(delta).items()]
        return self._pb_utils.InferenceResponse(tensors)

    def of_count(self, count: PromptCount) -> Any:
        """Make the only response to a request that is counted. Thread-safe."""
        return self._pb_utils.InferenceResponse([self._pb_utils.Tensor("count", encode_count(count))])

    def of_cancellation(self) -> Any:
        """Make the only response to a request that cancels others: without outputs, whether there were any or not.
        Thread-safe."""
        return self._pb_utils.InferenceResponse([])

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
        self._cached.clear()

    def _output(self, name: str, array: Any) -> Any:
        if name == "index":
            return self._cached_tensor(name, array, int(array[0]))
        if array.dtype == object and not array[0]:
            return self._cached_tensor(name, array, 0)
        return self._pb_utils.Tensor(name, array)

    def _cached_tensor(self, name: str, array: Any, number: int) -> Any:
        key = name, number
        if key not in self._cached:
            self._cached[key] = self._pb_utils.Tensor(name, array)
        return self._cached[key]

    def _code(self, error: Exception) -> Any:
        codes = self._pb_utils.TritonError
        if isinstance(error, (RequestError, ImageError)):
            return codes.INVALID_ARG
        if isinstance(error, (QueueFullError, ServerError)):
            return codes.UNAVAILABLE
        return codes.INTERNAL
