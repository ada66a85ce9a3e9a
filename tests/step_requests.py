"""Requests that drive a step backend by hand: prefill into a slot, decode slots together."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nvlm_trt.api import Message
from nvlm_trt.backends.base import StepBackend
from nvlm_trt.prompt.encoder import EncodedPrompt, PromptEncoder
from nvlm_trt.prompt.image_tokens import split_tiles
from nvlm_trt.prompt.tokenizer import Tokenizer


class StepRequest:
    """A prompt with encoded images, and greedy decoding of it through a backend."""

    def __init__(
        self, backend: StepBackend, engine_dir: Path, text: str, tiles_per_image: list[int], seed: int
    ) -> None:
        config = backend.config
        self.backend = backend
        self.encoder = PromptEncoder(config, Tokenizer.from_directory(engine_dir))
        self.prompt: EncodedPrompt = self.encoder.encode([Message("user", text)], tiles_per_image)
        rng = np.random.default_rng(seed)
        edge = config.vision.image_size
        tokens = [
            backend.encode(rng.standard_normal((tiles, 3, edge, edge), dtype=np.float32)) for tiles in tiles_per_image
        ]
        self.cross_tiles = [
            image[split_tiles(config.architecture, len(image))[1]] for image in map(backend.to_host, tokens)
        ]
        self.images = [backend.features(image) for image in tokens]
        self.embeddings = backend.embeddings(self.images, 0, self.prompt.placeholders)

    @property
    def length(self) -> int:
        return len(self.prompt.input_ids)

    @property
    def decode_range(self) -> tuple[int, int]:
        return self.prompt.decode_range

    def prefill(self, slot: int) -> np.ndarray:
        (logits,) = self.prefill_chunks(slot, self.length)
        return logits

    def prefill_chunks(self, slot: int, size: int, all_logits: bool = True) -> list[np.ndarray]:
        """Prefill `size` tokens at a time; return what the backend returns. `all_logits`: of every chunk, not of the
        last alone."""
        start = 0
        for image in self.images:
            self.backend.write_cross_kv(slot, start, image)
            start += image.cross_tokens
        assert start == self.prompt.cross_tokens
        prompt, taken = self.prompt, 0
        returned = []
        for begin in range(0, self.length, size):
            chunk = slice(begin, begin + size)
            ids = prompt.input_ids[chunk]
            count = int((ids == self.backend.config.image_token_id).sum())
            rows = self.backend.embeddings(self.images, taken, taken + count)
            wanted = all_logits or begin + size >= self.length
            returned.append(self.backend.prefill(slot, begin, ids, rows, prompt.cross_ranges[chunk], wanted))
            taken += count
        return returned


def decode(backend: StepBackend, requests: list[StepRequest], tokens: np.ndarray, step: int) -> np.ndarray:
    """Decodes requests[i] in slot i; `step` tokens were generated before."""
    positions = np.array([request.length + step for request in requests])
    return backend.decode(tokens, positions, np.array([request.decode_range for request in requests], np.int32))
