"""Wraps the application: API key, request id, metrics, and an answer to every error."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nvlm_trt.serving.gateway.errors import of_exception, unauthorized
from nvlm_trt.serving.gateway.gateway import Gateway

_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
# Prometheus keeps a series for each path: a stranger must not invent them
PATHS = frozenset(
    {
        "/",
        "/health",
        "/health/ready",
        "/metrics",
        "/openapi.json",
        "/v1/models",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/chat/completions/input_tokens",
    }
)
_OPEN_PATHS = frozenset({"/", "/health", "/health/ready"})  # need no key
_OBSERVING = frozenset({"/health", "/health/ready", "/metrics"})  # are no open requests


class Envelope:
    """An ASGI application around another."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        sent_id = headers.get(_HEADER, "")
        request_id = sent_id if _REQUEST_ID.fullmatch(sent_id) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[_HEADER] = request_id
            await send(message)

        gateway, is_open = self._gateway, path not in _OBSERVING
        gateway.open_requests += is_open
        try:
            if path not in _OPEN_PATHS and not gateway.options.keys.accept(_authorization(scope)):
                await unauthorized().response()(scope, receive, send_noting)
            else:
                await self._app(scope, receive, send_noting)
        except Exception as error:
            answer = of_exception(error)
            if not status:
                await answer.response()(scope, receive, send_noting)
        finally:
            gateway.open_requests -= is_open
            gateway.metrics.requests.labels(path if path in PATHS else "other", str(status or 499)).inc()


def _authorization(scope: Scope) -> bytes | None:
    return next((value for name, value in scope["headers"] if name == b"authorization"), None)
