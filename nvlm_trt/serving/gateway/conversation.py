"""Turns the messages of a chat completion into a conversation of ours."""

from __future__ import annotations

from collections.abc import Sequence

from nvlm_trt.api import ImagePart, Message, Part, TextPart
from nvlm_trt.image.image_limits import ImageLimits
from nvlm_trt.serving.gateway.chat_request import ChatMessage, ImageContent, ImageUrl, TextContent
from nvlm_trt.serving.gateway.errors import invalid
from nvlm_trt.serving.gateway.media import MediaReader

_LOW_DETAIL_TILES = 1


async def read_conversation(messages: Sequence[ChatMessage], media: MediaReader, limits: ImageLimits) -> list[Message]:
    """Read the images of the messages, and keep all parts in their order. Text is text, `<image>` in it too.

    Raises HttpError for too many images, and ImageError, which numbers the images from 1."""
    images = sum(isinstance(part, ImageContent) for message in messages for part in message.content)
    if images > limits.max_images:
        raise invalid(
            "too_many_images", f"the request has {images} images, at most {limits.max_images} are allowed", "messages"
        )
    conversation, number = [], 0
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        if isinstance(message.content, str):
            conversation.append(Message(role, [TextPart(message.content)]))
            continue
        parts: list[Part] = []
        for part in message.content:
            if isinstance(part, TextContent):
                parts.append(TextPart(part.text))
            else:
                number += 1
                parts.append(await _image_part(part, media, "image" if images == 1 else f"image {number}"))
        conversation.append(Message(role, parts))
    return conversation


async def _image_part(part: ImageContent, media: MediaReader, name: str) -> ImagePart:
    image = ImageUrl(url=part.image_url) if isinstance(part.image_url, str) else part.image_url
    return ImagePart(await media.read(image.url, name), _LOW_DETAIL_TILES if image.detail == "low" else None)
