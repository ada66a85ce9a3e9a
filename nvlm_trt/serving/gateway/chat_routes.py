"""Serves chat completions."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from nvlm_trt.api import ChatRequest
from nvlm_trt.prompt.tokenizer import tile_tags
from nvlm_trt.serving.gateway.answer_format import Heading
from nvlm_trt.serving.gateway.answering import asked, respond, while_connected
from nvlm_trt.serving.gateway.chat_format import ChatFormat
from nvlm_trt.serving.gateway.chat_request import ChatCompletionRequest
from nvlm_trt.serving.gateway.conversation import read_conversation
from nvlm_trt.serving.gateway.errors import invalid
from nvlm_trt.serving.gateway.gateway import Gateway
from nvlm_trt.serving.gateway.openapi import body_of
from nvlm_trt.serving.gateway.reading import parse
from nvlm_trt.serving.gateway.sampling import sampling_params
from nvlm_trt.serving.gateway.source import ServedModel


def chat_routes(gateway: Gateway) -> APIRouter:
    router = APIRouter()
    body = body_of(ChatCompletionRequest)

    @router.post("/v1/chat/completions", openapi_extra=body)
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation with images."""
        source = gateway.serving()
        with gateway.bodies.hold() as held:
            fields = await parse(ChatCompletionRequest, await gateway.bodies.read(request, held))
            chat = await _read_chat(gateway, source.model, request, fields)
            heading = Heading(f"chatcmpl-{request.state.request_id}", fields.model, source.model.system_fingerprint)
            form = ChatFormat(heading, (fields.top_logprobs or 0) if fields.logprobs else None)
            return await respond(gateway, source, request, asked(fields, chat, form))

    @router.post("/v1/chat/completions/input_tokens", openapi_extra=body)
    async def count_input_tokens(request: Request) -> Response:
        """Count the tokens and tiles of a conversation. Decodes its images, and runs no model."""
        source = gateway.serving()
        with gateway.bodies.hold() as held:
            fields = await parse(ChatCompletionRequest, await gateway.bodies.read(request, held))
            chat = await _read_chat(gateway, source.model, request, fields)
            count = await while_connected(request, source.count(chat, request.state.request_id))
        return JSONResponse(
            {
                "object": "chat.completion.input_tokens",
                "input_tokens": count.prompt_tokens,
                "input_tokens_details": {
                    "cached_tokens": 0,
                    "image_tokens": count.image_tokens,
                    "image_tiles": sum(image.tiles for image in count.images),
                    "cross_attended_tokens": count.cross_tokens,
                },
                "images": [{**asdict(image), "tags": tile_tags(image.tiles)} for image in count.images],
            }
        )

    return router


async def _read_chat(
    gateway: Gateway, model: ServedModel, request: Request, fields: ChatCompletionRequest
) -> ChatRequest:
    """Make the request for the source. Raises HttpError, and ImageError for an image that cannot be read."""
    gateway.check_name(fields.model, model)
    if fields.max_tiles is not None and fields.max_tiles > model.max_tiles:
        raise invalid(
            "invalid_value", f"max_tiles = {fields.max_tiles} is more than the engine's {model.max_tiles}", "max_tiles"
        )
    if fields.top_logprobs is not None and not fields.logprobs:
        raise invalid("invalid_value", 'top_logprobs needs "logprobs": true', "top_logprobs")
    # the chosen token alone takes one alternative
    alternatives = max(1, fields.top_logprobs or 0) if fields.logprobs else 0
    sampling = sampling_params(fields, model, fields.max_completion_tokens or fields.max_tokens, alternatives)
    reading = read_conversation(fields.messages, gateway.media, gateway.options.image_limits)
    messages = await while_connected(request, reading)
    return ChatRequest(messages, sampling=sampling, max_tiles=fields.max_tiles)
