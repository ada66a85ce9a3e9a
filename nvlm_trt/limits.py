"""Checks requests against the limits of an engine: all checks and their messages are here."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from nvlm_trt.bounds import MAX_SLOTS, MAX_TILES, MAX_TOKENS
from nvlm_trt.errors import ParameterError, RequestError, TooLargeError


class EngineLimits(BaseModel):
    """Holds the sizes that an engine was built for. The checks raise RequestError with the number that was exceeded."""

    model_config = ConfigDict(extra="forbid")

    max_slots: int = Field(default=8, gt=0, le=MAX_SLOTS)  # requests decoded at once
    max_seq_len: int = Field(default=2048, gt=0, le=MAX_TOKENS)  # tokens of prompt and answer in the LLM's sequence
    max_image_tokens: int = Field(default=0, ge=0, le=MAX_TOKENS)  # cross-attended tokens per request (X, H)
    max_tiles: int = Field(default=6, gt=0, le=MAX_TILES)  # tiles per image, thumbnail not counted

    @property
    def tiles_per_image(self) -> int:
        """Count the most tiles that one image becomes, thumbnail included."""
        return self.max_tiles + (self.max_tiles > 1)

    def check_max_tiles(self, max_tiles: object) -> None:
        """Check the option `max_tiles` of a request."""
        if not (type(max_tiles) is int and 1 <= max_tiles <= self.max_tiles):
            raise ParameterError(
                f"max_tiles = {max_tiles!r} is not allowed; it is an integer from 1 to {self.max_tiles}"
            )

    def check_encoded_tiles(self, tiles: int) -> None:
        """Check the tiles of an image that the caller has encoded."""
        if not 1 <= tiles <= self.tiles_per_image:
            raise RequestError(
                f"image_tokens of {tiles} tiles are not allowed; an image has 1 to {self.tiles_per_image}"
            )

    def check_characters(self, characters: int, most: int) -> None:
        """Check the length of a text before it is tokenised: more than `most` characters give more than max_seq_len
        tokens."""
        if characters > most:
            raise TooLargeError(
                f"the prompt has {characters} characters, more than the {self.max_seq_len} tokens that the engine "
                "holds; shorten it, or rebuild with --max-seq-len"
            )

    def check_answers(self, n: int) -> None:
        """Check the number of answers that a request asks for: each has a slot."""
        if n > self.max_slots:
            raise ParameterError(
                f"sampling parameter n = {n} is not allowed; it is an integer from 1 to {self.max_slots}, the slots of "
                "the engine"
            )

    def check_prompt(self, tokens: int, image_embeddings: int) -> None:
        """Check that the engine holds a prompt of `tokens`, image embeddings included, and one token of the answer."""
        if tokens >= self.max_seq_len:
            raise TooLargeError(
                f"the prompt has {tokens} tokens ({image_embeddings} of images), the engine holds "
                f"{self.max_seq_len} with the answer; shorten it, lower max_tiles, or rebuild with --max-seq-len"
            )

    def check_sequence(self, tokens: int) -> None:
        """Check the number of tokens in the KV cache after a step."""
        if tokens > self.max_seq_len:
            raise TooLargeError(
                f"the sequence would have {tokens} tokens, the engine holds {self.max_seq_len}; shorten the prompt, or "
                "rebuild with --max-seq-len"
            )

    def check_cross_tokens(self, tokens: int) -> None:
        """Check the number of cross-attended tokens of all images of a request."""
        if tokens > self.max_image_tokens:
            raise TooLargeError(
                f"the images have {tokens} cross-attended tokens, the engine holds {self.max_image_tokens}; send "
                "fewer images, lower max_tiles, or rebuild with --max-image-tokens"
            )


def check_embeddings(placeholders: int, embeddings: int) -> None:
    """Check that a prompt has one image embedding per image placeholder. Raises RequestError."""
    if placeholders != embeddings:
        raise RequestError(
            f"{placeholders} image placeholders in the prompt, {embeddings} image embeddings were given; encode the "
            "prompt with the images that it is sent with"
        )
