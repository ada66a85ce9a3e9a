"""Exceptions as error responses: one line that the client reads."""

from __future__ import annotations

import traceback
from typing import Any

import triton_python_backend_utils as pb_utils

from nvlm_trt.errors import ImageError, NvlmError, QueueFullError, RequestError, ServerError
from nvlm_trt.serving.chat_tensors import encode_error


def error_response(error: Exception) -> Any:
    """A response without outputs. What is not an NvlmError is a defect: its traceback goes to the server's log."""
    if isinstance(error, NvlmError):
        message = encode_error(error)
    else:
        pb_utils.Logger.log_error("".join(traceback.format_exception(error)))
        message = f"internal error ({type(error).__name__}); the server's log has the details"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, _code(error)))


def _code(error: Exception) -> Any:
    if isinstance(error, (RequestError, ImageError)):
        return pb_utils.TritonError.INVALID_ARG
    if isinstance(error, (QueueFullError, ServerError)):
        return pb_utils.TritonError.UNAVAILABLE
    return pb_utils.TritonError.INTERNAL
