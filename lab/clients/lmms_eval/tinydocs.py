"""Gives lmms-eval the conversations of TinyDocs, with the prompts of `nvlm-trt eval`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

FOLDER = Path("/tmp/tinydocs")


def messages(sample: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Makes one user turn: every image, a newline after each, and the text."""
    content: list[dict[str, Any]] = []
    for image in images(sample):
        content += [{"type": "image", "url": image}, {"type": "text", "text": "\n"}]
    return [{"role": "user", "content": [*content, {"type": "text", "text": prompt(sample)}]}]


def images(sample: Mapping[str, Any]) -> list[Image.Image]:
    """Opens the sample's images. A key that other samples of the file have is None."""
    paths = sample.get("images") or [path for path in [sample.get("image")] if path]
    return [Image.open(FOLDER / path) for path in paths]


def prompt(sample: Mapping[str, Any]) -> str:
    text = sample["prompt"]
    assert isinstance(text, str)
    return text
