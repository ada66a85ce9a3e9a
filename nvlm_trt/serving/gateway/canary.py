"""Sends the first two requests to every source: the gateway is ready once they are answered."""

from __future__ import annotations

from contextlib import aclosing

from nvlm_trt.api import ChatRequest, ImagePart, Message, SamplingParams, TextPart
from nvlm_trt.serving.gateway.source import ChatSource
from nvlm_trt.serving.triton.canary import canary_image

_SAMPLING = SamplingParams(max_tokens=1)


async def run_canary(source: ChatSource) -> None:
    """Ask a text and an image of one tile. Raises the source's error if one fails."""
    text = Message("user", [TextPart("Hello")])
    image = Message("user", [ImagePart(canary_image(), 1), TextPart("What is this?")])
    for message in (text, image):
        async with aclosing(source.stream(ChatRequest([message], sampling=_SAMPLING), "canary")) as deltas:
            async for _ in deltas:
                pass
