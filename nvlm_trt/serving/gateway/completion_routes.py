"""Serves text completions."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from nvlm_trt.api import ChatRequest, Message, TextPart
from nvlm_trt.serving.gateway.answer_format import Heading
from nvlm_trt.serving.gateway.answering import asked, respond
from nvlm_trt.serving.gateway.completion_request import CompletionRequest
from nvlm_trt.serving.gateway.gateway import Gateway
from nvlm_trt.serving.gateway.openapi import body_of
from nvlm_trt.serving.gateway.reading import parse
from nvlm_trt.serving.gateway.sampling import sampling_params
from nvlm_trt.serving.gateway.text_format import TextFormat

_DEFAULT_TOKENS = 16  # OpenAI's


def completion_routes(gateway: Gateway) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", openapi_extra=body_of(CompletionRequest))
    async def create_completion(request: Request) -> Response:
        """Answer a text."""
        source = gateway.serving()
        with gateway.bodies.hold() as held:
            fields = await parse(CompletionRequest, await gateway.bodies.read(request, held))
            gateway.check_name(fields.model, source.model)
            alternatives = 0 if fields.logprobs is None else max(1, fields.logprobs)
            sampling = sampling_params(fields, source.model, fields.max_tokens or _DEFAULT_TOKENS, alternatives)
            heading = Heading(f"cmpl-{request.state.request_id}", fields.model, source.model.system_fingerprint)
            form = TextFormat(heading, fields.logprobs)
            chat = ChatRequest([Message("user", [TextPart(fields.text)])], sampling=sampling)
            return await respond(gateway, source, request, asked(fields, chat, form))

    return router
