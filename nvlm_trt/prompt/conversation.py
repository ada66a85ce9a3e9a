"""Reads conversations: messages as they are sent become turns in which every image has its place."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from nvlm_trt.api import ImagePart, Message, Part, Role, TextPart
from nvlm_trt.errors import RequestError

IMAGE_MARK = "<image>"
_MARK = re.compile(r"(?<!\\)" + re.escape(IMAGE_MARK))
_LITERAL_MARK = "\\" + IMAGE_MARK  # stands for the text `<image>` where marks count


@dataclass(frozen=True)
class Turn:
    """One message, ready to be encoded."""

    role: Role
    parts: tuple[str | None, ...]  # text, or None: the next image

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if part is not None)


def lift_images(messages: Sequence[Message], images: Sequence[Any]) -> tuple[list[Message], list[Any]]:
    """Take the images out of the image parts. Return the messages without images, and all images in order.

    `images` are sent beside the messages. Raises RequestError if image parts and `images` both have images, or if only
    some image parts have one."""
    lifted = [part.image for message in messages for part in _image_parts(message) if part.image is not None]
    if lifted and images:
        raise RequestError("images are sent both in parts and beside the messages; send them in one of the two ways")
    if lifted and len(lifted) < sum(1 for message in messages for _ in _image_parts(message)):
        raise RequestError("some image parts have an image and some have none; give each its image")
    return [_without_data(message) for message in messages], lifted or list(images)


def tiles_of_images(messages: Sequence[Message], images: int, max_tiles: int | None) -> list[int | None]:
    """Return the most tiles of each image: its part's, or else `max_tiles`, that of the request."""
    parts = [part for message in messages for part in _image_parts(message)]
    if not parts:
        return [max_tiles] * images
    return [max_tiles if part.max_tiles is None else part.max_tiles for part in parts]


def place_images(messages: Sequence[Message], images: int) -> list[Turn]:
    """Make turns in which every image has its place.

    The places are the image parts. In a conversation without image parts they are the `<image>` marks in the user's
    plain strings; without marks, all images stand before the first user message, a newline after each.
    Raises RequestError for an empty prompt, misplaced roles, and places that do not match the number of images."""
    _check_roles(messages)
    if any(True for message in messages for _ in _image_parts(message)):
        turns = [Turn(message.role, tuple(_parts_of(message))) for message in messages]
    else:
        turns = _split_at_marks(messages, images)
    places = sum(part is None for turn in turns for part in turn.parts)
    if places != images:
        raise RequestError(f"{places} image parts in the messages, {images} images were sent; send an image for each")
    if not images and not turns[-1].text.strip():
        raise RequestError("the prompt is empty; send a question or an image")
    return turns


def _check_roles(messages: Sequence[Message]) -> None:
    if not messages or messages[-1].role != "user":
        raise RequestError("the last message must be the user's; add one with the question")
    if any(message.role == "system" for message in messages[1:]):
        raise RequestError("a system message must be the first; move it there")
    for message in messages:
        if message.role != "user" and any(True for _ in _image_parts(message)):
            raise RequestError(f"a message of the role {message.role} holds an image; move it to a user's message")


def _split_at_marks(messages: Sequence[Message], images: int) -> list[Turn]:
    """Make turns of messages without image parts."""
    pieces = [_pieces(message) if images else [_text_of(message)] for message in messages]
    marks = sum(len(of_message) - 1 for of_message in pieces)
    if marks and marks != images:
        raise RequestError(f"{marks} {IMAGE_MARK} marks for {images} images; mark the place of each, or of none")
    unplaced = 0 if marks else images
    turns = []
    for message, (first, *others) in zip(messages, pieces, strict=True):
        parts: list[str | None] = [first]
        for text in others:
            parts += [None, text]
        if message.role == "user":
            parts[:0] = [None, "\n"] * unplaced
            unplaced = 0
        turns.append(Turn(message.role, tuple(parts)))
    return turns


def _pieces(message: Message) -> list[str]:
    """Split the text of a message at its marks. Only a user's plain string has marks."""
    if message.role != "user" or not isinstance(message.content, str):
        return [_text_of(message)]
    return [piece.replace(_LITERAL_MARK, IMAGE_MARK) for piece in _MARK.split(message.content)]


def _image_parts(message: Message) -> Iterator[ImagePart]:
    if not isinstance(message.content, str):
        yield from (part for part in message.content if isinstance(part, ImagePart))


def _without_data(message: Message) -> Message:
    if isinstance(message.content, str):
        return message
    return replace(
        message, content=[replace(p, image=None) if isinstance(p, ImagePart) else p for p in message.content]
    )


def _parts_of(message: Message) -> Iterator[str | None]:
    if isinstance(message.content, str):
        yield message.content
    else:
        yield from (part.text if isinstance(part, TextPart) else None for part in message.content)


def _text_of(message: Message) -> str:
    return "".join(part for part in _parts_of(message) if part is not None)


# --- messages as JSON ------------------------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _JsonText(_Strict):
    type: Literal["text"]
    text: str


class _JsonImage(_Strict):
    type: Literal["image"]
    max_tiles: int | None = None


class _JsonMessage(_Strict):
    role: Role
    content: str | list[Annotated[_JsonText | _JsonImage, Field(discriminator="type")]]


_PART = TypeAdapter(Annotated[_JsonText | _JsonImage, Field(discriminator="type")])
_PART_FORM = '{"type": "text", "text": ...} or {"type": "image"}, with or without "max_tiles": 1'


def parse_messages(messages: Any) -> list[Message]:
    """Check a decoded JSON list of {"role": ..., "content": ...}. Content is a string, or a list of parts; the part
    {"type": "image"} is the place of the next image that is sent beside the messages. Raises RequestError that names
    the first fault."""
    if not isinstance(messages, list) or not messages:
        raise RequestError('messages must be a non-empty list of {"role": ..., "content": ...}')
    return [_parse_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _parse_message(message: Any, where: str) -> Message:
    try:
        parsed = _JsonMessage.model_validate(message)
    except ValidationError as error:
        faulty = {str(item["loc"][0]) for item in error.errors() if item["loc"] and item["type"] != "missing"}
        raise _message_error(message, faulty, where) from None
    if isinstance(parsed.content, str):
        return Message(parsed.role, parsed.content)
    parts: list[Part] = [
        TextPart(p.text) if isinstance(p, _JsonText) else ImagePart(max_tiles=p.max_tiles) for p in parsed.content
    ]
    return Message(parsed.role, parts)


def _message_error(message: Any, faulty: set[str], where: str) -> RequestError:
    if not isinstance(message, dict) or message.keys() != {"role", "content"}:
        return RequestError(f'{where} must be an object with the keys "role" and "content" and no others')
    if "role" in faulty:
        return RequestError(f"{where}.role {reprlib.repr(message['role'])} is not one of {', '.join(get_args(Role))}")
    content = f"{where}.content must be a string or a list of parts"
    if not isinstance(message["content"], list):
        return RequestError(content)
    index = next(index for index, part in enumerate(message["content"]) if not _is_part(part))
    return RequestError(f"{content}; part {index} must be {_PART_FORM}")


def _is_part(part: Any) -> bool:
    try:
        _PART.validate_python(part)
    except ValidationError:
        return False
    return True
