"""Defines how an engine runs a layer at a time, for a machine that cannot hold the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nvlm_trt.backends.base import FloatArray, IntArray, RangeArray


@dataclass(frozen=True)
class ForcedSequence:
    """Holds a prompt and the tokens that follow the prompt, whatever a model would choose: S tokens, P of the prompt.

    Because the tokens are known, a layer can run all of them before the next layer is loaded."""

    input_ids: IntArray  # [S]
    cross_ranges: RangeArray  # [S, 2]
    prompt_tokens: int  # P; the image placeholders are among them
    image_tokens: FloatArray  # [M, hidden], one for each image placeholder
    cross_kv: FloatArray | None = None  # [cross layers, 2 (key, value), kv_heads, C, head_dim]

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
