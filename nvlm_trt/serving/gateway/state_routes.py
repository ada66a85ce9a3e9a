"""Serves what is known of the gateway: its health, its models, its metrics."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from nvlm_trt.serving.gateway.errors import model_not_found
from nvlm_trt.serving.gateway.gateway import Gateway
from nvlm_trt.serving.gateway.source import ServedModel

_NO_STORE = {"Cache-Control": "no-store"}


def state_routes(gateway: Gateway) -> APIRouter:
    router = APIRouter()
    created = int(time.time())

    def card(name: str, model: ServedModel) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "nvlm-trt",
            "root": model.name,
            "checkpoint_digest": model.checkpoint_digest,
            "max_model_len": model.max_seq_len,
            "max_tiles": model.max_tiles,
            "max_images": gateway.options.image_limits.max_images,
            "input_modalities": ["text", "image"],
            "output_modalities": ["text"],
        }

    @router.get("/health")
    async def health() -> Response:
        """Say that the gateway is alive."""
        return JSONResponse({"status": "alive"}, headers=_NO_STORE)

    @router.get("/health/ready")
    async def readiness() -> Response:
        """Say whether requests are answered: with status 503 before the first two test requests have been answered,
        while the gateway drains, and while its server cannot be reached."""
        if await gateway.ready():
            return JSONResponse({"status": "ready"}, headers=_NO_STORE)
        return JSONResponse({"status": "draining" if gateway.draining else "not ready"}, 503, _NO_STORE)

    @router.get("/v1/models")
    async def list_models() -> Response:
        """List the names of the served model."""
        model = gateway.serving().model
        return JSONResponse({"object": "list", "data": [card(name, model) for name in gateway.names(model)]})

    @router.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> Response:
        """Describe the served model."""
        model = gateway.serving().model
        names = gateway.names(model)
        if name not in names:
            raise model_not_found(name, ", ".join(names))
        return JSONResponse(card(name, model))

    @router.get("/metrics")
    @router.head("/metrics")
    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(gateway.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    return router
