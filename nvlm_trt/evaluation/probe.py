"""What `nvlm-trt verify` asks an engine and the reference: an image, a question, and tokens that follow."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from nvlm_trt.api import Message
from nvlm_trt.backends.base import FloatArray
from nvlm_trt.backends.layers import ForcedSequence
from nvlm_trt.engine import Engine
from nvlm_trt.image.decoding import load_image
from nvlm_trt.image.image_file import naming_files, read_image_file
from nvlm_trt.image.tiling import tile_image
from nvlm_trt.prompt.encoder import PromptEncoder
from nvlm_trt.prompt.image_tokens import split_tiles
from nvlm_trt.prompt.tokenizer import Tokenizer

QUESTION = "What is written in the second line?"
_ANSWER = 'The second line of the image says "line 2: NVLM". '


class Probe:
    """One image, and prompts with and without the image."""

    def __init__(self, engine: Engine, image: Path | None) -> None:
        """`image` None: one that is drawn. Raises ImageError that names the file."""
        self.config, self._max_tiles = engine.config, engine.limits.max_tiles
        self.image = read_image(image) if image is not None else draw_image(engine.config.vision.image_size)
        self._picture = load_image(self.image)
        self._tokenizer = Tokenizer.from_directory(engine.path)
        self._prompts = PromptEncoder(engine.config, self._tokenizer)
        self.tag_length = self._prompts.tag_length

    def tiles(self) -> FloatArray:
        """Return the tiles [n, 3, E, E] that a server cuts."""
        return tile_image(self._picture, self.config.vision.image_size, self._max_tiles)

    def reference_tiles(self) -> FloatArray:
        """Return the tiles [n, 3, E, E] that the reference cuts."""
        from nvlm_trt.reference.preprocess import reference_tiles

        tiles: FloatArray = reference_tiles(self._picture, self.config.vision.image_size, self._max_tiles).numpy()
        return tiles

    def tag_ids(self, tiles: int) -> npt.NDArray[np.int64] | None:
        """Return the tags [tiles, tag_length] of cross-attended tiles; None but for NVLM-H."""
        return self._prompts.tag_ids(tiles) if self.config.architecture == "H" else None

    def given(self, tokens: int) -> list[int]:
        """Return the first tokens of an answer, which begins anew where it ends."""
        return [int(token) for token in np.resize(self._tokenizer.encode(_ANSWER), tokens)]

    def sequence(self, image_tokens: FloatArray, cross_kv: FloatArray | None, answer: Sequence[int]) -> ForcedSequence:
        """Return the prompt with the image, of image_tokens [tiles, T, hidden], and its answer."""
        prompt = self._prompts.encode([Message("user", QUESTION)], [len(image_tokens)])
        in_llm, _ = split_tiles(self.config.architecture, len(image_tokens))
        embeddings = np.ascontiguousarray(image_tokens[in_llm].reshape(-1, image_tokens.shape[-1]))
        return ForcedSequence.of(prompt, answer, embeddings, cross_kv)

    def text(self) -> ForcedSequence:
        """Return the prompt without the image."""
        prompt = self._prompts.encode([Message("user", QUESTION)])
        nothing = np.empty((0, self.config.llm.hidden_size), np.float32)
        return ForcedSequence.of(prompt, [], nothing)


def read_image(path: Path) -> bytes:
    """Read an image file. Raises ImageError that names the file before the stages are compared."""
    data = read_image_file(path)
    with naming_files([path]):
        load_image(data)
    return data


def draw_image(edge: int) -> bytes:
    """Draw a PNG with text and shapes, wide enough to become several tiles of `edge` x `edge` pixels."""
    image = Image.new("RGB", (3 * edge, 2 * edge), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse([edge // 8, edge // 8, edge, edge], fill="#c03030")
    draw.polygon([(2 * edge, edge // 4), (3 * edge - 8, edge), (edge + edge // 2, edge)], fill="#3050b0")
    for line in range(4):
        draw.text((edge // 8, edge * (5 + line) // 4), f"line {line + 1}: NVLM", fill="black", font_size=edge // 6)
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()
