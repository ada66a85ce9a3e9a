"""Names why a request was not answered, for metrics."""

from __future__ import annotations

from nvlm_trt.errors import ImageError, ParameterError, QueueFullError, RequestError, ServerError, TooLargeError

# the first class that fits decides
_REASONS: dict[type[Exception], str] = {
    QueueFullError: "queue_full",
    TooLargeError: "too_large",
    ImageError: "bad_image",
    ParameterError: "bad_parameter",
    RequestError: "bad_request",
    ServerError: "stopping",
    Exception: "internal",
}
REASONS = tuple(_REASONS.values())


def error_reason(error: Exception) -> str:
    """Return one of REASONS."""
    return next(reason for kind, reason in _REASONS.items() if isinstance(error, kind))
