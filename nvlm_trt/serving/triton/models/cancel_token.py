"""Reads by which token a request may be cancelled, or which token it cancels.

A client that ends a request in this way, and not with gRPC's cancel, spares tritonserver 2.51 a race that ends it."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from nvlm_trt.errors import RequestError
from nvlm_trt.serving.chat_tensors import CANCEL, CANCEL_TOKEN
from nvlm_trt.serving.triton.models.inputs import request_parameters

PARAMETERS = (CANCEL_TOKEN, CANCEL)
# Only the token protects a request from other clients, so one that is short enough to be guessed is refused.
_TOKEN = re.compile(r"[A-Za-z0-9_-]{32,128}")


class Tokens(NamedTuple):
    own: str | None  # cancels this request
    cancelled: str | None  # of the requests that this one is to cancel; None: it asks for something else


def read_tokens(request: Any) -> Tokens:
    """Read the parameters of a request. Raises RequestError for an unknown one, for a malformed token, and for a
    request that cancels others and has something else, too."""
    parameters = request_parameters(request, PARAMETERS)
    tokens = Tokens(_token(parameters, CANCEL_TOKEN), _token(parameters, CANCEL))
    if tokens.cancelled and (tokens.own or request.inputs()):
        raise RequestError(f"a request with the parameter {CANCEL!r} asks for nothing else; send it without inputs")
    return tokens


def _token(parameters: Mapping[str, Any], name: str) -> str | None:
    if name not in parameters:
        return None
    token = parameters[name]
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise RequestError(
            f"request parameter {name!r} is {reprlib.repr(token)}, no token of 32 to 128 of the characters A-Z, a-z, "
            "0-9, _ and -; make one at random"
        )
    return token
