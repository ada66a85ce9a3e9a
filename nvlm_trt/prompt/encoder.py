"""Chat + images -> token ids, where image tokens go, and what each token may cross-attend.

The format is ChatML as Qwen2 writes it, with the image text of nvidia/NVLM-D-72B. Sources: vLLM's
model_executor/models/nvlm_d.py (tags and placeholders of NVLM-D-72B), and NVIDIA/Megatron-LM, where NVLM was trained:
examples/multimodal/run_text_generation.py and dataset_helpers.py (the system message), model.py (`_get_tile_tags`),
megatron/training/tokenizer/multimodal_tokenizer.py (`qwen2p0_custom_template`: a newline after every <|im_end|>).
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from nvlm_trt.errors import ConfigError, RequestError
from nvlm_trt.model.config import Architecture, NvlmConfig
from nvlm_trt.prompt.token_sequence import Range, TokenSequence
from nvlm_trt.prompt.tokenizer import (
    IMAGE_END,
    IMAGE_START,
    MESSAGE_END,
    MESSAGE_START,
    THUMBNAIL_TAG,
    Tokenizer,
    tile_tag,
)

Role = Literal["system", "user", "assistant"]

SYSTEM_MESSAGE = "Answer the questions."
IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Message:
    """One turn. In a user's content `<image>` marks the place of an image, if the request has images."""

    role: Role
    content: str


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the decoder takes it: S tokens, and C cross-attended tokens of all its images in order."""

    input_ids: npt.NDArray[np.int64]  # [S]
    cross_ranges: npt.NDArray[np.int32]  # [S, 2]: start, end within 0..C; (0, 0) reads nothing
    llm_image_tokens: int  # how many of input_ids are the image token
    cross_tokens: int  # C


def parse_messages(messages: Any) -> list[Message]:
    """Check a decoded JSON list of {"role": ..., "content": ...}. Raises RequestError naming the first fault."""
    if not isinstance(messages, list) or not messages:
        raise RequestError('messages must be a non-empty list of {"role": ..., "content": ...}')
    parsed = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise RequestError(f'{where} must be an object with the keys "role" and "content" and no others')
        if message["role"] not in get_args(Role):
            raise RequestError(
                f"{where}.role {reprlib.repr(message['role'])} is not one of {', '.join(get_args(Role))}"
            )
        if not isinstance(message["content"], str):
            raise RequestError(f"{where}.content must be a string")
        parsed.append(Message(message["role"], message["content"]))
    return parsed


def split_tiles(architecture: Architecture, tiles: int) -> tuple[slice, slice]:
    """Of one image's tiles, thumbnail last: those whose tokens join the LLM's sequence, those cross-attended."""
    if architecture == "D":
        return slice(0, tiles), slice(0, 0)
    regular = tiles if architecture == "X" else tiles - 1
    return slice(regular, tiles), slice(0, regular)


def count_image_tokens(config: NvlmConfig, tiles: int, tag_length: int) -> tuple[int, int]:
    """Of one image of `tiles` tiles: tokens in the LLM's sequence, and cross-attended ones, NVLM-H's tags included."""
    in_llm, in_cross = (len(range(tiles)[part]) for part in split_tiles(config.architecture, tiles))
    return in_llm * config.tokens_per_tile, in_cross * config.cross_tokens_per_tile(tag_length)


class PromptEncoder:
    """Encodes conversations for one model.

    Cross-attention ranges: a tile tag of NVLM-X reads its own tile's tokens; every other token of X and H reads all
    images whose last tag stands before it, which is (0, 0) before the first. NVLM-D's are all (0, 0).
    """

    def __init__(self, config: NvlmConfig, tokenizer: Tokenizer) -> None:
        if tokenizer.vocab_size > config.llm.vocab_size:
            raise ConfigError(
                f"tokenizer.json has {tokenizer.vocab_size} ids, the model's vocab_size is {config.llm.vocab_size}; "
                "use the tokenizer that the model was trained with"
            )
        self._config = config
        self._tokenizer = tokenizer
        self._image_token_id = tokenizer.image_token_id if config.image_token_id is None else config.image_token_id
        self.tag_length = self.tag_ids(config.max_tiles).shape[1]  # tokens of one tile's tag (H), 0 for D and X

    def tag_ids(self, max_tiles: int) -> npt.NDArray[np.int64]:
        """[max_tiles, tag_length]: the tags whose text embeddings stand before each tile in NVLM-H's cross-attention.

        D and X have none there: tag_length 0. Raises ConfigError if the tags differ in length.
        """
        if self._config.architecture != "H":
            return np.zeros((max_tiles, 0), np.int64)
        tags = [self._encode_tag(number) for number in range(1, max_tiles + 1)]
        for number, tag in enumerate(tags, start=1):
            if len(tag) != len(tags[0]):
                raise ConfigError(
                    f"{tile_tag(number)} is {len(tag)} tokens and {tile_tag(1)} is {len(tags[0])}, NVLM-H needs tags "
                    f"of one length; lower max_dynamic_patch to {number - 1} or add the tags to tokenizer.json"
                )
        return np.array(tags, np.int64)

    def encode(self, messages: Sequence[Message], tiles_per_image: Sequence[int] = ()) -> EncodedPrompt:
        """Encode a conversation; `tiles_per_image`: each image's tiles, thumbnail included.

        Images stand where user messages say `<image>`, or all before the first user message, a newline after each.
        Raises RequestError for an empty prompt, misplaced roles, and marks that do not match the images.
        """
        _check_turns(messages, has_images=len(tiles_per_image) > 0)
        if messages[0].role != "system":
            messages = [Message("system", SYSTEM_MESSAGE), *messages]
        images = iter(tiles_per_image)
        sequence = TokenSequence(self._tokenizer)
        for message in _place_marks(messages, len(tiles_per_image)):
            sequence.add_markup(MESSAGE_START)
            sequence.add_text(f"{message.role}\n")
            may_hold_marks = message.role == "user" and tiles_per_image
            first, *others = message.content.split(IMAGE_MARK) if may_hold_marks else [message.content]
            sequence.add_text(first)
            for text in others:
                self._add_image(sequence, next(images))
                sequence.add_text(text)
            sequence.add_markup(MESSAGE_END)
            sequence.add_text("\n")
        sequence.add_markup(MESSAGE_START)
        sequence.add_text("assistant\n")
        return self._finish(sequence, tiles_per_image)

    @staticmethod
    def decode_range(prompt: EncodedPrompt) -> Range:
        """What every generated token reads: all images of the prompt."""
        return 0, prompt.cross_tokens

    def _add_image(self, sequence: TokenSequence, tiles: int) -> None:
        assert tiles >= 1, tiles
        tags = [*(tile_tag(number) for number in range(1, tiles)), THUMBNAIL_TAG]
        in_llm, in_cross = (range(tiles)[part] for part in split_tiles(self._config.architecture, tiles))
        start, size = sequence.seen, self._config.cross_tokens_per_tile(self.tag_length)
        is_x = self._config.architecture == "X"

        sequence.add_markup(IMAGE_START)
        for tile in in_cross if is_x else in_llm:
            sequence.add_markup(tags[tile], reads=(start + tile * size, start + (tile + 1) * size) if is_x else None)
            if tile == tiles - 1:
                sequence.seen = start + len(in_cross) * size
            if not is_x:
                sequence.add_tokens(self._image_token_id, self._config.tokens_per_tile)
        sequence.add_markup(IMAGE_END)

    def _finish(self, sequence: TokenSequence, tiles_per_image: Sequence[int]) -> EncodedPrompt:
        input_ids, cross_ranges = sequence.finish()
        tiles = sum(len(range(n)[split_tiles(self._config.architecture, n)[0]]) for n in tiles_per_image)
        expected = tiles * self._config.tokens_per_tile
        if np.count_nonzero(input_ids == self._image_token_id) != expected:
            # possible only where config.json makes an ordinary token the image token
            raise RequestError(f"the text encodes to the image token {self._image_token_id}; remove it from the text")
        return EncodedPrompt(input_ids, cross_ranges, expected, sequence.seen)

    def _encode_tag(self, number: int) -> list[int]:
        sequence = TokenSequence(self._tokenizer)
        sequence.add_markup(tile_tag(number))
        return sequence.finish()[0].tolist()


def _check_turns(messages: Sequence[Message], has_images: bool) -> None:
    if not messages or messages[-1].role != "user":
        raise RequestError("the last message must be the user's; add one with the question")
    if any(message.role == "system" for message in messages[1:]):
        raise RequestError("a system message must be the first; move it there")
    if not has_images and not messages[-1].content.strip():
        raise RequestError("the prompt is empty; send a question or an image")


def _place_marks(messages: Sequence[Message], images: int) -> Sequence[Message]:
    """Check that there is a mark for every image; without any, put all before the first user message's text."""
    marks = sum(message.content.count(IMAGE_MARK) for message in messages if message.role == "user")
    if images == 0 or marks == images:
        return messages
    if marks:
        raise RequestError(f"{marks} {IMAGE_MARK} marks for {images} images; mark the place of each, or of none")
    first = next(index for index, message in enumerate(messages) if message.role == "user")
    marked = Message("user", f"{IMAGE_MARK}\n" * images + messages[first].content)
    return [*messages[:first], marked, *messages[first + 1 :]]
