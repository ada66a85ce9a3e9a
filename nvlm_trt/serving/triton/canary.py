"""The first two requests of every server: ready means that a text and a picture have been answered."""

from __future__ import annotations

import io

from PIL import Image

from nvlm_trt.api import SamplingParams
from nvlm_trt.serving.client import Client

_SAMPLING = SamplingParams(max_tokens=1)


def run_canary(client: Client) -> None:
    """Raises what the client raises if one of them fails."""
    client.generate("Hello", sampling=_SAMPLING)
    client.generate("What is this?", images=[_picture()], sampling=_SAMPLING, max_tiles=1)


def _picture() -> bytes:
    """A PNG of one tile."""
    encoded = io.BytesIO()
    Image.linear_gradient("L").save(encoded, "PNG")
    return encoded.getvalue()
