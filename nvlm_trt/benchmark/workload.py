"""What a benchmark asks: how long prompts and answers are, how many pictures of which size, new ones or the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nvlm_trt.errors import RequestError

if TYPE_CHECKING:
    from nvlm_trt.benchmark.prompts import PromptWriter

# the longest edge of a JPEG, and what the server decodes at most (docs/triton.md)
_LONGEST_EDGE = 65_500
_MOST_PIXELS = 64_000_000
_MOST_IMAGES = 16
_MOST_TOKENS = 10_000_000
_LENGTHS_HINT = "write 64, or 16:128 for any from 16 to 128"


@dataclass(frozen=True)
class Lengths:
    """A number of tokens: fixed, or drawn uniformly from `low` to `high`, both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high <= _MOST_TOKENS:
            raise RequestError(f"{self} is not a number of tokens; {_LENGTHS_HINT}")

    @classmethod
    def parse(cls, text: str, option: str) -> Lengths:
        """Of `64` or `16:128`; `option` names the culprit."""
        match = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", text.strip())
        try:
            return cls(int(match[1]), int(match[2] or match[1])) if match else cls(0, 0)
        except RequestError:
            raise RequestError(f"{option} {text!r} is not a number of tokens; {_LENGTHS_HINT}") from None

    def draw(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.low, self.high, endpoint=True))

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


@dataclass(frozen=True)
class ImageSize:
    """Pixels."""

    width: int
    height: int

    def __post_init__(self) -> None:
        longest, pixels = max(self.width, self.height), self.width * self.height
        if not (min(self.width, self.height) >= 1 and longest <= _LONGEST_EDGE and pixels <= _MOST_PIXELS):
            raise RequestError(
                f"pictures of {self} pixels are not possible; edges are 1 to {_LONGEST_EDGE} pixels, and a picture has "
                f"at most {_MOST_PIXELS // 1_000_000} megapixels"
            )

    @classmethod
    def parse(cls, text: str, option: str) -> ImageSize:
        match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text.strip())
        if not match:
            raise RequestError(f"{option} {text!r} is not WIDTHxHEIGHT; write 1344x896")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Workload:
    """What is asked at every load. Two runs of equal workloads ask the same but for the pictures' stamps."""

    prompt_tokens: Lengths  # of the question's text; the chat's format and the pictures come on top
    output_tokens: Lengths
    images: int  # per request
    image_sizes: tuple[ImageSize, ...]  # of each picture one, drawn
    repeat_images: bool  # the same pictures in every request, so that the server's image cache holds them
    max_tiles: int | None
    requests: int  # measured, per load
    warmup: int | None  # asked before them, not measured; None: the load's own number
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.images <= _MOST_IMAGES:
            raise RequestError(f"{self.images} pictures per request are not possible; ask with 0 to {_MOST_IMAGES}")
        if self.images and not self.image_sizes:
            raise RequestError("pictures need a size; pass --image-size WIDTHxHEIGHT")
        if self.requests < 1 or (self.warmup is not None and self.warmup < 0):
            raise RequestError("a load has at least one measured request and no negative warm-up")
        if self.seed < 0:
            raise RequestError(f"seed {self.seed} is negative; choose 0 or more")

    def to_dict(self) -> dict[str, Any]:
        """As it stands in results, where equal workloads are equal dicts."""
        return asdict(self) | {
            "prompt_tokens": str(self.prompt_tokens),
            "output_tokens": str(self.output_tokens),
            # what does not matter without pictures
            "image_sizes": [str(size) for size in self.image_sizes] if self.images else [],
            "repeat_images": self.repeat_images and self.images > 0,
            "max_tiles": self.max_tiles if self.images else None,
        }


@dataclass(frozen=True)
class Picture:
    """A picture to draw. The stamp is written into its bytes: pictures of one size differ in nothing else."""

    size: ImageSize
    stamp: str


@dataclass(frozen=True)
class Question:
    """One request."""

    index: int
    text: str
    output_tokens: int
    pictures: tuple[Picture, ...]
    max_tiles: int | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Question:
        pictures = (Picture(ImageSize(**picture["size"]), picture["stamp"]) for picture in values["pictures"])
        return cls(**{**values, "pictures": tuple(pictures)})


def questions(workload: Workload, prompts: PromptWriter, count: int, salt: str) -> list[Question]:
    """The first `count` requests of a workload.

    Question i is the same in every run and at every load, whatever the count, but for the stamps of new pictures:
    those hold `salt`, without which a server that has seen an earlier run would answer from its cache.
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
        pictures=tuple(_pictures(sizes, "repeated" if workload.repeat_images else f"{salt}, request {index}")),
        max_tiles=workload.max_tiles,
    )


def _pictures(sizes: Sequence[ImageSize], stamp: str) -> list[Picture]:
    return [Picture(size, f"{stamp}, picture {number}") for number, size in enumerate(sizes, start=1)]
