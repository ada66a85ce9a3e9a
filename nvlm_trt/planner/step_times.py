"""Estimates the times of an engine's steps on one device, from its rates and assumed efficiencies.

A time is the longer of products and memory traffic, each at a share of what the device's data sheet promises. Nothing
here was measured; the assumptions are constants of this file, and `nvlm-trt plan` prints them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.planner.roofline import Roofline, Work
from nvlm_trt.prompt.image_tokens import count_image_tokens

COMPUTE_EFFICIENCY = 0.6  # of the data sheet's dense rate
MEMORY_EFFICIENCY = 0.75  # of the data sheet's bandwidth


@dataclass(frozen=True)
class StepTime:
    """Seconds, by what takes them."""

    products: float
    memory: float
    communication: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.products, self.memory) + self.communication


class StepTimes(Protocol):
    """Estimates the times of the steps of one engine. Arguments are those of `Roofline`."""

    chunk_size: int  # most tokens of a prompt in one step

    def encode(self, tiles: int) -> StepTime:
        """Estimate the time of an image: its features are ready for the decoder."""
        ...

    def chunk(self, tokens: int, position: int, cross_tokens: int) -> StepTime: ...

    def decode(self, sequences: int, tokens: int, cross_tokens: int) -> StepTime: ...


class DeviceTimes:
    """Implements `StepTimes` for an engine on one device."""

    def __init__(self, design: EngineDesign, bandwidth: float, rate: Callable[[str], float]) -> None:
        """`bandwidth`: bytes per second; `rate`: precision -> operations per second."""
        self._roofline, self._design = Roofline(design), design
        self._bandwidth, self._rate = bandwidth * MEMORY_EFFICIENCY, rate
        self.chunk_size = self._roofline.chunk_size

    def encode(self, tiles: int) -> StepTime:
        vision = self._time(self._roofline.encode(tiles), "vision_encoder")
        _, cross_tokens = count_image_tokens(self._design.config, tiles, self._design.tag_length)
        if not cross_tokens:
            return vision
        cross = self._time(self._roofline.cross_kv(cross_tokens), "cross_attention")
        return StepTime(vision.products + cross.products, vision.memory + cross.memory)

    def chunk(self, tokens: int, position: int, cross_tokens: int) -> StepTime:
        return self._time(self._roofline.chunk(tokens, position, cross_tokens), "decoder")

    def decode(self, sequences: int, tokens: int, cross_tokens: int) -> StepTime:
        return self._time(self._roofline.decode(sequences, tokens, cross_tokens), "decoder")

    def _time(self, work: Work, component: str) -> StepTime:
        precision = self._design.precisions[component]
        return StepTime(work.flops / (self._rate(precision) * COMPUTE_EFFICIENCY), work.nbytes / self._bandwidth)


def time_of_prompt(times: StepTimes, tokens: int, cross_tokens: int) -> StepTime:
    """Add up the steps of a prompt of `tokens` tokens in the LLM. The sum's seconds are those of its steps if products
    bind all of them, or memory binds all."""
    parts = [
        times.chunk(min(times.chunk_size, tokens - position), position, cross_tokens)
        for position in range(0, tokens, times.chunk_size)
    ]
    return StepTime(
        sum(part.products for part in parts),
        sum(part.memory for part in parts),
        sum(part.communication for part in parts),
    )
