"""Makes the requests of a workload: each has its own text, lengths and images, the same in every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nvlm_trt.benchmark.workload import ImageSize, Workload

if TYPE_CHECKING:
    from nvlm_trt.benchmark.prompts import PromptWriter


@dataclass(frozen=True)
class StampedImage:
    """Describes an image to draw. Two images of one size have the same pixels; the stamp makes their bytes differ."""

    size: ImageSize
    stamp: str


@dataclass(frozen=True)
class Question:
    """Holds one request."""

    index: int
    text: str
    output_tokens: int
    images: tuple[StampedImage, ...]
    max_tiles: int | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Question:
        images = (StampedImage(ImageSize(**image["size"]), image["stamp"]) for image in values["images"])
        return cls(**{**values, "images": tuple(images)})


def questions(workload: Workload, prompts: PromptWriter, count: int, salt: str) -> list[Question]:
    """Makes the first `count` requests of a workload.

    Question i is the same in every run, at every load and for every count, except for the stamps of new images: they
    hold `salt`. Without the salt, a server that has seen an earlier run would answer from its cache.
    """
    return [_question(workload, prompts, index, salt) for index in range(count)]


def _question(workload: Workload, prompts: PromptWriter, index: int, salt: str) -> Question:
    rng = np.random.default_rng([workload.seed, index])
    prompt_tokens, output_tokens = workload.prompt_tokens.draw(rng), workload.output_tokens.draw(rng)
    sizes = [workload.image_sizes[rng.integers(len(workload.image_sizes))] for _ in range(workload.images)]
    return Question(
        index=index,
        text=prompts.write(prompt_tokens, rng),
        output_tokens=output_tokens,
        images=tuple(_stamped(sizes, "repeated" if workload.repeat_images else f"{salt}, request {index}")),
        max_tiles=workload.max_tiles,
    )


def _stamped(sizes: Sequence[ImageSize], stamp: str) -> list[StampedImage]:
    return [StampedImage(size, f"{stamp}, image {number}") for number, size in enumerate(sizes, start=1)]
