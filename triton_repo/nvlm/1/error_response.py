"""Exceptions as Triton errors: one line that the client reads, with the gRPC status that fits."""

from __future__ import annotations

import traceback
from typing import Any

import triton_python_backend_utils as pb_utils

from nvlm_trt.errors import ImageError, NvlmError, QueueFullError, RequestError, ServerError
from nvlm_trt.serving.wire import QUEUE_FULL


def error_response(error: Exception) -> Any:
    """A response with no outputs. What is not an NvlmError is a defect: its traceback goes to the server's log."""
    if not isinstance(error, NvlmError):
        pb_utils.Logger.log_error("".join(traceback.format_exception(error)))
        message = f"internal error ({type(error).__name__}); the server's log has the details"
        return _response(message, pb_utils.TritonError.INTERNAL)
    if isinstance(error, (RequestError, ImageError)):
        return _response(str(error), pb_utils.TritonError.INVALID_ARG)
    if isinstance(error, QueueFullError):
        return _response(QUEUE_FULL + str(error), pb_utils.TritonError.UNAVAILABLE)
    if isinstance(error, ServerError):
        return _response(str(error), pb_utils.TritonError.UNAVAILABLE)
    return _response(str(error), pb_utils.TritonError.INTERNAL)


def _response(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
