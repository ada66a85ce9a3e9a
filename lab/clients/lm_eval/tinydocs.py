"""Gives lm-eval the prompts and images of TinyDocs. lm-eval puts the images before the text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

FOLDER = Path("/tmp/tinydocs")


def images(sample: Mapping[str, Any]) -> list[Image.Image]:
    return [Image.open(FOLDER / path) for path in paths(sample)]


def prompt(sample: Mapping[str, Any]) -> str:
    """Gives the text with the newline that `nvlm-trt eval` has between the last image and the text."""
    return "\n" * bool(paths(sample)) + sample["prompt"]


def paths(sample: Mapping[str, Any]) -> list[str]:
    """Lists the sample's images. A key that other samples of the file have is None."""
    return sample.get("images") or [path for path in [sample.get("image")] if path]
