"""Sends the first two requests of every server: it counts as ready once it has answered a text and an image."""

from __future__ import annotations

import io

from PIL import Image

from nvlm_trt.api import SamplingParams
from nvlm_trt.serving.client import Client

_SAMPLING = SamplingParams(max_tokens=1)


def run_canary(client: Client) -> None:
    """Sends both requests. Raises the client's error if one fails."""
    client.generate("Hello", sampling=_SAMPLING)
    client.generate("What is this?", images=[canary_image()], sampling=_SAMPLING, max_tiles=1)


def canary_image() -> bytes:
    """Draws a PNG that becomes one tile."""
    encoded = io.BytesIO()
    Image.linear_gradient("L").save(encoded, "PNG")
    return encoded.getvalue()
