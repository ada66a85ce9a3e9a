"""Defines the options that bound the decoding of each image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from nvlm_trt.image.decoding import ImageLimits

DecodeSecondsOption = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="Most CPU time to decode an image [5].", show_default=False)
]
DecodeMemoryOption = Annotated[
    int | None, typer.Option(metavar="MIB", help="Most memory to decode an image [2048].", show_default=False)
]


def image_limits(max_decode_seconds: float | None, max_decode_memory: int | None) -> ImageLimits:
    """Make the limits of the options given. Raises ConfigError."""
    from nvlm_trt.image.decoding import ImageLimits

    given: dict[str, Any] = {}
    if max_decode_seconds is not None:
        given["max_decode_seconds"] = max_decode_seconds
    if max_decode_memory is not None:
        given["max_decode_memory"] = max_decode_memory << 20
    return ImageLimits(**given)
