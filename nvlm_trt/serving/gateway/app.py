"""Makes the gateway's application: OpenAI's endpoints over a `ChatSource`."""

from __future__ import annotations

import importlib.metadata

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp

from nvlm_trt.errors import NvlmError
from nvlm_trt.serving.gateway.answering import ClientGoneError
from nvlm_trt.serving.gateway.chat_request import ChatCompletionRequest
from nvlm_trt.serving.gateway.chat_routes import chat_routes
from nvlm_trt.serving.gateway.completion_request import CompletionRequest
from nvlm_trt.serving.gateway.completion_routes import completion_routes
from nvlm_trt.serving.gateway.envelope import Envelope
from nvlm_trt.serving.gateway.errors import HttpError, of_exception
from nvlm_trt.serving.gateway.gateway import Gateway
from nvlm_trt.serving.gateway.openapi import describe
from nvlm_trt.serving.gateway.page.page_routes import page_routes
from nvlm_trt.serving.gateway.state_routes import state_routes

_METHODS = ("GET", "HEAD", "POST")
_HEADERS = ("Authorization", "Content-Type", "X-Request-Id")


def create_app(gateway: Gateway) -> ASGIApp:
    """Make the application. Its requests are refused until `gateway.source` is set."""
    options = gateway.options
    app = FastAPI(title="nvlm-trt", version=importlib.metadata.version("nvlm-trt"), docs_url=None, redoc_url=None)
    for router in (state_routes(gateway), chat_routes(gateway), completion_routes(gateway)):
        app.include_router(router)
    if options.has_page:
        app.include_router(page_routes())
    describe(app, [ChatCompletionRequest, CompletionRequest], bool(options.keys))
    for kind in (HttpError, NvlmError, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    for gone in (ClientGoneError, ClientDisconnect):
        app.add_exception_handler(gone, _answer_nobody)
    wrapped: ASGIApp = Envelope(app, gateway)
    if options.cors_origins:
        wrapped = CORSMiddleware(
            wrapped,
            allow_origins=options.cors_origins,
            allow_methods=_METHODS,
            allow_headers=_HEADERS,
            expose_headers=("X-Request-Id", "Retry-After"),
        )
    return wrapped


async def _answer_error(request: Request, error: Exception) -> Response:
    return of_exception(error).response()


async def _answer_nobody(request: Request, error: Exception) -> Response:
    """Answer a client that has left; only the metrics see the status."""
    return Response(status_code=499)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Answer what the router itself refuses: an unknown path, or another method than the path has."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    message = f"{request.method[:20]} {request.url.path[:200]}: {str(error.detail).lower()}; see /openapi.json"
    return HttpError(
        error.status_code, "invalid_request_error", code, message, headers=dict(error.headers or {})
    ).response()
