"""Defines how an engine runs a layer at a time, for a machine that cannot hold the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nvlm_trt.backends.base import FloatArray, IntArray, RangeArray
from nvlm_trt.prompt.encoder import EncodedPrompt


@dataclass(frozen=True)
class ForcedSequence:
    """Holds a prompt and the tokens that follow the prompt, whatever a model would choose: S tokens, P of the prompt.

    Because the tokens are known, a layer can run all of them before the next layer is loaded."""

    input_ids: IntArray  # [S]
    cross_ranges: RangeArray  # [S, 2]
    prompt_tokens: int  # P; the image placeholders are among them
    image_tokens: FloatArray  # [M, hidden], one for each image placeholder
    cross_kv: FloatArray | None = None  # [cross layers, 2 (key, value), kv_heads, C, head_dim]

    @classmethod
    def of(
        cls,
        prompt: EncodedPrompt,
        answer: Sequence[int],
        image_tokens: FloatArray,
        cross_kv: FloatArray | None = None,
    ) -> ForcedSequence:
        """Let `answer` follow a prompt; image_tokens [M, hidden], cross_kv as above."""
        ranges = np.array([prompt.decode_range] * len(answer), np.int32).reshape(-1, 2)
        return cls(
            np.concatenate([prompt.input_ids, np.array(answer, np.int64)]),
            np.concatenate([prompt.cross_ranges, ranges]),
            len(prompt.input_ids),
            image_tokens,
            cross_kv,
        )

    @property
    def steps(self) -> list[slice]:
        """Return the tokens of each run of a decoder: the prompt, then one token after the other."""
        tokens = len(self.input_ids)
        return [slice(0, self.prompt_tokens), *(slice(at, at + 1) for at in range(self.prompt_tokens, tokens))]


class EngineLayers(Protocol):
    """Runs stages of one engine with the weights of one layer in memory. Computes what a `StepBackend` does."""

    def encode(self, pixel_values: FloatArray) -> FloatArray:
        """Encode pixel_values [tiles, 3, E, E] into image tokens [tiles, T, hidden]."""
        ...

    def logits(self, sequences: Sequence[ForcedSequence]) -> list[FloatArray]:
        """Run each sequence: its prompt at once, then token by token. Returns the logits of every run's last token, [1
        + S - P, vocab] per sequence."""
        ...
