"""Turns a calibration's samples into what a model reads: the tiles of the images, the prompt, and the known answer.

The known answer stands for the one that the model would generate: so the tokens of a sample do not depend on the
weights, and each layer can be run over all samples before the next layer is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from nvlm_trt.api import Message
from nvlm_trt.backends.base import IntArray, RangeArray
from nvlm_trt.closing import ClosedOnExit
from nvlm_trt.errors import ImageError, RequestError
from nvlm_trt.evaluation.samples import Sample
from nvlm_trt.image.decoder import ImageDecoder
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.prompt.encoder import PromptEncoder
from nvlm_trt.prompt.tokenizer import Tokenizer

ANSWER_TOKENS: Final = 16  # of the answer, at most; they add little to the many tokens of the prompt
CHUNK: Final = 2048  # most tokens in one run: nearly every sample takes one

Tiles = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Chunk:
    """Tokens start .. stop - 1 of a sample, which run together. lm_head multiplies the last `rows` of them."""

    start: int
    stop: int
    rows: int


@dataclass(frozen=True)
class Reading:
    """Holds the tokens of one sample: S of prompt and answer."""

    input_ids: IntArray  # [S]
    cross_ranges: RangeArray  # [S, 2]
    prompt_tokens: int
    tiles: tuple[int, ...]  # of each image, thumbnail included

    def chunks(self) -> Iterator[Chunk]:
        """Yield the tokens in order. lm_head multiplies the last token of the prompt and all of the answer, as when a
        model generates it, and the last token of every run."""
        for start in range(0, len(self.input_ids), CHUNK):
            stop = min(start + CHUNK, len(self.input_ids))
            yield Chunk(start, stop, max(1, stop - max(start, self.prompt_tokens - 1)))


class SampleReader(ClosedOnExit):
    """Reads the samples for one model, within the limits of the engine that is built."""

    def __init__(self, config: NvlmConfig, limits: EngineLimits, model_files: Path) -> None:
        """`model_files`: the folder with the tokenizer."""
        self._config, self._limits = config, limits
        self._tokenizer = Tokenizer.from_directory(model_files)
        self._prompts = PromptEncoder(config, self._tokenizer)
        self._decoder = ImageDecoder()

    def read(self, sample: Sample) -> tuple[Reading, list[Tiles]]:
        """Return the tokens of a sample, and the RGB tiles [tiles, 3, E, E] of each of its images.

        Raises RequestError for a sample that the engine cannot hold, ImageError for an image that does not decode."""
        try:
            images = self.images(sample)
            return self._reading(sample, [len(tiles) for tiles in images]), images
        except (RequestError, ImageError) as error:
            raise type(error)(f"calibration sample {sample.name}: {error}") from None

    def images(self, sample: Sample) -> list[Tiles]:
        images = []
        for index in range(len(sample.images)):
            with self._decoder.turn() as turn:
                edge, most = self._config.vision.image_size, self._limits.max_tiles
                images.append(turn.tiles(sample.images[index], edge, most))
        return images

    def close(self) -> None:
        self._decoder.close()

    def _reading(self, sample: Sample, tiles: Sequence[int]) -> Reading:
        prompt = self._prompts.encode([Message("user", sample.prompt)], tiles)
        self._limits.check_prompt(len(prompt.input_ids), prompt.placeholders)
        self._limits.check_cross_tokens(prompt.cross_tokens)
        room = min(ANSWER_TOKENS, self._limits.max_seq_len - len(prompt.input_ids))
        answer = np.array(self._tokenizer.encode(sample.answer)[:room], np.int64)
        ranges = np.tile(np.array(prompt.decode_range, np.int32), (len(answer), 1))
        return Reading(
            np.concatenate([prompt.input_ids, answer]),
            np.concatenate([prompt.cross_ranges, ranges]),
            len(prompt.input_ids),
            tuple(tiles),
        )
