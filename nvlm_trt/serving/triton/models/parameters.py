"""Reads the parameters that a rendered config.pbtxt gives to a python model."""

from __future__ import annotations

import json
from collections.abc import Mapping

from nvlm_trt.image.decoding import ImageLimits


def read_parameters(args: Mapping[str, str]) -> dict[str, str]:
    """Read the parameters from `args`, the argument of `initialize`."""
    entries = json.loads(args["model_config"])["parameters"]
    return {name: entry["string_value"] for name, entry in entries.items()}


def engine_directory(parameters: Mapping[str, str]) -> str:
    """Return the engine's directory, from the server's. The parameter `engine` is for people: its characters may be
    others than ASCII, which the interpreter of a model cannot use in paths."""
    return parameters.get("engine_link", parameters["engine"])


def image_limits(parameters: Mapping[str, str]) -> ImageLimits:
    return ImageLimits(**{name: int(parameters[name]) for name in ("max_pixels", "max_bytes", "max_images")})
