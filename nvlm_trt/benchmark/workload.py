"""Describes the requests of a benchmark: lengths of prompts and answers, numbers and sizes of images."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nvlm_trt.errors import RequestError

# the longest edge of a JPEG, and the largest image that the server decodes (docs/triton.md)
_LONGEST_EDGE = 65_500
_MOST_PIXELS = 64_000_000
_MOST_IMAGES = 16
_MOST_TOKENS = 10_000_000
_LENGTHS_HINT = "write 64, or 16:128 for any from 16 to 128"


@dataclass(frozen=True)
class Lengths:
    """Describes a number of tokens: fixed, or drawn uniformly from `low` to `high`, both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high <= _MOST_TOKENS:
            raise RequestError(f"{self} is not a number of tokens; {_LENGTHS_HINT}")

    @classmethod
    def parse(cls, text: str, option: str) -> Lengths:
        """Parses `64` or `16:128`. Raises RequestError that names `option`."""
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
    """Holds width and height of an image in pixels."""

    width: int
    height: int

    def __post_init__(self) -> None:
        longest, pixels = max(self.width, self.height), self.width * self.height
        if not (min(self.width, self.height) >= 1 and longest <= _LONGEST_EDGE and pixels <= _MOST_PIXELS):
            raise RequestError(
                f"images of {self} pixels are not possible; edges are 1 to {_LONGEST_EDGE} pixels, and an image has "
                f"at most {_MOST_PIXELS // 1_000_000} megapixels"
            )

    @classmethod
    def parse(cls, text: str, option: str) -> ImageSize:
        """Parses `1344x896`. Raises RequestError that names `option`."""
        match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text.strip())
        if not match:
            raise RequestError(f"{option} {text!r} is not WIDTHxHEIGHT; write 1344x896")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Workload:
    """Describes the requests of every load. Two runs of equal workloads differ only in the stamps of their images."""

    prompt_tokens: Lengths  # in the question's text, without the chat's format and the images
    output_tokens: Lengths
    images: int  # per request
    image_sizes: tuple[ImageSize, ...]  # each image has one of these sizes, drawn at random
    repeat_images: bool  # the same images in every request, so that the server's image cache holds them
    max_tiles: int | None
    requests: int  # measured, per load
    warmup: int | None  # requests before the measured ones; None: the load's own number
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.images <= _MOST_IMAGES:
            raise RequestError(f"{self.images} images per request are not possible; ask with 0 to {_MOST_IMAGES}")
        if self.images and not self.image_sizes:
            raise RequestError("images need a size; pass --image-size WIDTHxHEIGHT")
        if self.requests < 1 or (self.warmup is not None and self.warmup < 0):
            raise RequestError("a load has at least one measured request and no negative warm-up")
        if self.seed < 0:
            raise RequestError(f"seed {self.seed} is negative; choose 0 or more")

    def to_dict(self) -> dict[str, Any]:
        """Returns the workload as results hold it: equal workloads are equal dicts."""
        return asdict(self) | {
            "prompt_tokens": str(self.prompt_tokens),
            "output_tokens": str(self.output_tokens),
            # without images, these values do not matter
            "image_sizes": [str(size) for size in self.image_sizes] if self.images else [],
            "repeat_images": self.repeat_images and self.images > 0,
            "max_tiles": self.max_tiles if self.images else None,
        }
