"""Serves the page for trying the model."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from nvlm_trt.serving.gateway.page.page_document import read_page


def page_routes() -> APIRouter:
    router = APIRouter()
    page = read_page()
    headers = {
        "Content-Security-Policy": page.policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def show_page() -> Response:
        return Response(page.body, headers=headers, media_type="text/html")

    return router
