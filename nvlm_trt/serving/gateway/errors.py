"""Maps errors to answers of the HTTP endpoints: a status, and the object `error` that OpenAI's clients read."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse

from nvlm_trt.errors import (
    ImageError,
    NvlmError,
    QueueFullError,
    RequestError,
    ServerError,
    TooLargeError,
)

logger = logging.getLogger(__name__)

RETRY_SECONDS = 1
_RETRY = {"Retry-After": str(RETRY_SECONDS)}
_OF_A_PARAMETER = re.compile("sampling parameter (?P<name>[a-z_]+) |max_tiles = ")
_OF_A_CONSTRAINT = re.compile(r"sampling parameter constraint(?:\.(?P<kind>[a-z_]+))?")
_FIELD_OF_KIND = {  # of one without a kind, or with several, the default
    "json_schema": "response_format",
    "json_object": "response_format",
    "regex": "structured_outputs.regex",
    "choice": "structured_outputs.choice",
}
_INVALID = "invalid_request_error"


@dataclass(eq=False)
class HttpError(Exception):
    """An answer that is an error. `param` names the key of the request that is wrong."""

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, dict(self.headers))


def invalid(code: str, message: str, param: str | None = None) -> HttpError:
    """Return the error of a request that is wrong in itself: status 400."""
    return HttpError(400, _INVALID, code, message, param)


def unsupported(param: str, message: str) -> HttpError:
    """Return the error of a parameter that OpenAI's interface has and this server does not."""
    return invalid("unsupported_parameter", message, param)


def too_large(message: str) -> HttpError:
    return HttpError(413, _INVALID, "request_too_large", message)


def unauthorized() -> HttpError:
    """Return the error of a missing or wrong API key. Does not say which of the two it is."""
    message = "missing or wrong API key; send the header `Authorization: Bearer KEY`"
    return HttpError(401, "authentication_error", "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})


def model_not_found(name: str, known: str) -> HttpError:
    message = f"the model {name[:100]!r} is not served here; served are {known}"
    return HttpError(404, _INVALID, "model_not_found", message, "model")


def not_ready() -> HttpError:
    message = "the server is starting, stopping or cannot be reached; try again later"
    return HttpError(503, "server_error", "service_unavailable", message, headers=_RETRY)


def queue_full(message: str) -> HttpError:
    return HttpError(429, "rate_limit_error", "queue_full", message, headers=_RETRY)


def _internal() -> HttpError:
    return HttpError(500, "server_error", "internal_error", "internal error; the server's log has the details")


def of_exception(error: Exception) -> HttpError:
    """Return the answer to an exception. Logs what the client must not see: addresses, paths, tracebacks."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, QueueFullError):
        return queue_full(str(error))
    if isinstance(error, ImageError):
        return invalid("invalid_image", str(error), "messages")
    if isinstance(error, TooLargeError):
        return invalid("context_length_exceeded", str(error), "messages")
    # by its message, because a server tells no more
    if isinstance(error, RequestError) and (constraint := _OF_A_CONSTRAINT.match(str(error))):
        name = _FIELD_OF_KIND.get(constraint["kind"], "structured_outputs")
        return invalid("invalid_value", name + str(error)[constraint.end() :], name)
    if isinstance(error, RequestError) and (parameter := _OF_A_PARAMETER.match(str(error))):
        return invalid("invalid_value", str(error), parameter["name"] or "max_tiles")
    if isinstance(error, RequestError):
        return invalid("invalid_request", str(error), "messages")
    if isinstance(error, ServerError):
        logger.warning("%s", error)
        return not_ready()
    if isinstance(error, NvlmError):  # of the engine
        logger.error("%s", error)
        return _internal()
    logger.error("a request failed", exc_info=error)
    return _internal()
