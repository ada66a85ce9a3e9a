"""Encodes conversations: token ids, image placeholders, and the range that each token cross-attends.

The format is ChatML as Qwen2 writes it, with the image text of nvidia/NVLM-D-72B. Sources: vLLM's
model_executor/models/nvlm_d.py (tags and placeholders of NVLM-D-72B), and NVIDIA/Megatron-LM, where NVLM was trained:
examples/multimodal/run_text_generation.py and dataset_helpers.py (the system message), model.py (`_get_tile_tags`),
megatron/training/tokenizer/multimodal_tokenizer.py (`qwen2p0_custom_template`: a newline after every <|im_end|>).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nvlm_trt.api import Message
from nvlm_trt.errors import ConfigError, RequestError
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.prompt.conversation import Turn, place_images
from nvlm_trt.prompt.image_tokens import count_image_tokens, split_tiles
from nvlm_trt.prompt.token_sequence import Range, Tokenised, TokenSequence
from nvlm_trt.prompt.tokenizer import (
    IMAGE_END,
    IMAGE_START,
    MESSAGE_END,
    MESSAGE_START,
    Tokenizer,
    tile_tag,
    tile_tags,
)

SYSTEM_MESSAGE = "Answer the questions."


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt for the decoder: S tokens, and C cross-attended tokens of all images in order."""

    input_ids: npt.NDArray[np.int64]  # [S]
    cross_ranges: npt.NDArray[np.int32]  # [S, 2]: start, end within 0..C; (0, 0) reads nothing
    placeholders: int  # image placeholders among input_ids: one per image embedding
    cross_tokens: int  # C

    @property
    def decode_range(self) -> Range:
        """Return the range that every generated token reads: all images of the prompt."""
        return 0, self.cross_tokens


class PromptEncoder:
    """Encodes conversations for one model.

    Cross-attention ranges: a tile tag of NVLM-X reads the tokens of its tile. Every other token of NVLM-X and NVLM-H
    reads all images whose last tag stands before the token: (0, 0) before the first image. In NVLM-D all are (0, 0).
    """

    def __init__(self, config: NvlmConfig, tokenizer: Tokenizer) -> None:
        if tokenizer.vocab_size > config.llm.vocab_size:
            raise ConfigError(
                f"tokenizer.json has {tokenizer.vocab_size} ids, the model's vocab_size is {config.llm.vocab_size}; "
                "use the tokenizer that the model was trained with"
            )
        self.config = config
        self.tokenizer = tokenizer
        self.placeholder_id = tokenizer.image_token_id if config.image_token_id is None else config.image_token_id
        self.tag_length = self.tag_ids(config.max_tiles).shape[1]  # tokens of one tile's tag (H), 0 for D and X

    def tag_ids(self, max_tiles: int) -> npt.NDArray[np.int64]:
        """Return [max_tiles, tag_length]: NVLM-H cross-attends the text embeddings of these ids before each tile.

        NVLM-D and NVLM-X have tag_length 0. Raises ConfigError if the tags differ in length.
        """
        if self.config.architecture != "H":
            return np.zeros((max_tiles, 0), np.int64)
        tags = [self._encode_tag(number) for number in range(1, max_tiles + 1)]
        for number, tag in enumerate(tags, start=1):
            if len(tag) != len(tags[0]):
                raise ConfigError(
                    f"{tile_tag(number)} is {len(tag)} tokens and {tile_tag(1)} is {len(tags[0])}, NVLM-H needs tags "
                    f"of one length; lower max_dynamic_patch to {number - 1} or add the tags to tokenizer.json"
                )
        return np.array(tags, np.int64)

    def draft(self, messages: Sequence[Message], images: int) -> PromptDraft:
        """Draft the prompt of a conversation whose images are not tiled yet. Raises the errors of `place_images`."""
        turns = place_images(messages, images)
        characters = sum(len(turn.text) for turn in turns)
        if turns[0].role != "system":
            turns = [Turn("system", (SYSTEM_MESSAGE,)), *turns]
        return PromptDraft(self, turns, characters)

    def encode(self, messages: Sequence[Message], tiles_per_image: Sequence[int] = ()) -> EncodedPrompt:
        """Encode a conversation. `tiles_per_image`: the tiles of each image, thumbnail included.

        Raises the errors of `place_images` and of `PromptDraft.encode`."""
        return self.draft(messages, len(tiles_per_image)).encode(tiles_per_image)

    def _encode_tag(self, number: int) -> list[int]:
        sequence = TokenSequence(self.tokenizer)
        sequence.add_markup(tile_tag(number))
        return sequence.finish()[0].tolist()


class PromptDraft:
    """Encodes one prompt for any numbers of tiles, as often as needed: for a lower bound, then for the tiled images.

    Every stretch of text is tokenised only once."""

    def __init__(self, encoder: PromptEncoder, turns: Sequence[Turn], characters: int) -> None:
        self.characters = characters  # length of the text that was sent
        self._encoder = encoder
        self._turns = turns
        self._tokenised: dict[str, Tokenised] = {}

    def encode(self, tiles_per_image: Sequence[int]) -> EncodedPrompt:
        """Encode the prompt. Raises RequestError for text that is not valid Unicode or becomes a control token."""
        images = iter(tiles_per_image)
        sequence = TokenSequence(self._encoder.tokenizer, self._tokenised)
        for turn in self._turns:
            sequence.add_markup(MESSAGE_START)
            sequence.add_text(f"{turn.role}\n")
            for part in turn.parts:
                if part is None:
                    self._add_image(sequence, next(images))
                else:
                    sequence.add_text(part)
            sequence.add_markup(MESSAGE_END)
            sequence.add_text("\n")
        sequence.add_markup(MESSAGE_START)
        sequence.add_text("assistant\n")
        return self._finish(sequence, tiles_per_image)

    def _add_image(self, sequence: TokenSequence, tiles: int) -> None:
        assert tiles >= 1, tiles
        config = self._encoder.config
        tags = tile_tags(tiles)
        in_llm, in_cross = (range(tiles)[part] for part in split_tiles(config.architecture, tiles))
        start, size = sequence.seen, config.cross_tokens_per_tile(self._encoder.tag_length)
        is_x = config.architecture == "X"

        sequence.add_markup(IMAGE_START)
        for tile in in_cross if is_x else in_llm:
            sequence.add_markup(tags[tile], reads=(start + tile * size, start + (tile + 1) * size) if is_x else None)
            if tile == tiles - 1:
                sequence.seen = start + len(in_cross) * size
            if not is_x:
                sequence.add_tokens(self._encoder.placeholder_id, config.tokens_per_tile)
        sequence.add_markup(IMAGE_END)

    def _finish(self, sequence: TokenSequence, tiles_per_image: Sequence[int]) -> EncodedPrompt:
        input_ids, cross_ranges = sequence.finish()
        config, placeholder_id = self._encoder.config, self._encoder.placeholder_id
        expected = sum(count_image_tokens(config, tiles, self._encoder.tag_length)[0] for tiles in tiles_per_image)
        if np.count_nonzero(input_ids == placeholder_id) != expected:
            # possible only if config.json makes an ordinary token the image placeholder
            raise RequestError(f"the text encodes to the image token {placeholder_id}; remove it from the text")
        return EncodedPrompt(input_ids, cross_ranges, expected, sequence.seen)
